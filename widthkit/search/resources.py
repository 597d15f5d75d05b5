"""Build searchers by name, with what the search offers to those that ask for it by a parameter's name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from widthkit.budget import Budget
from widthkit.errors import OptionError
from widthkit.graph import FloatArray
from widthkit.search.judging import Loss
from widthkit.search.searcher import SEARCHERS, Searcher
from widthkit.supernet import Supernet
from widthkit.supernet.ranking import unit_scores

UnitScores = Callable[[str], Mapping[str, FloatArray]]
"""Criterion -> group name -> ``[units]``: importance of the supernet's units."""


@dataclass(frozen=True)
class Resources:
    """The supernet, data and loss from which the extra arguments of searchers are made.

    Args:
        net: The supernet; not trained yet when a run is only checked.
        data: Held-out batches ``(inputs, targets)``, where there are any yet.
        loss: The criterion; cross entropy where there is none.
    """

    net: Supernet
    data: Iterable[Any] | None = None
    loss: Loss | None = None

    def offered(self) -> dict[str, Any]:
        """Return what searchers may ask for, by the name of a parameter of their constructor."""
        net = self.net
        if self.data is None:  # Options are checked before there is data; any scores will do.
            even = {name: np.ones(width) for name, width in net.wide_graph.full.items()}
            return {"unit_scores": lambda criterion: even, "history": net.width_history.records}
        return {
            "unit_scores": lambda criterion: unit_scores(
                net.model, net.wide_graph, criterion, data=self.data, loss=self.loss
            ),
            "history": net.width_history.records,
        }


def make_searcher(
    name: str,
    resources: Resources,
    budget: Budget,
    rng: np.random.Generator,
    options: Mapping[str, Any],
    can_train: bool = False,
) -> Searcher:
    """Build a registered searcher for a supernet's space.

    Args:
        name: Its registered name.
        resources: What it may ask for.
        budget: What networks may cost.
        rng: Its generator.
        options: What the user set.
        can_train: Whether somebody trains networks that it wants trained on their own.

    Raises:
        PluginError: If no searcher has that name.
        OptionError: If it does not take one of the options, or not with that value, or it needs trainings.
    """
    offered = resources.offered()
    searcher: Searcher = SEARCHERS.build(name, options, resources.net.space, budget, rng, offered=offered)
    if searcher.trainings and not can_train:
        raise OptionError(
            f"searcher '{name}' wants {searcher.trainings} networks trained on their own; pass train_fn, which trains "
            "a network of given widths and returns its accuracy"
        )
    return searcher


def check_searcher(
    name: str, net: Supernet, budget: Budget, options: Mapping[str, Any], can_train: bool = False
) -> None:
    """Refuse a searcher or its options before anything is trained.

    Raises:
        PluginError: If no searcher has that name.
        OptionError: If it does not take one of the options, or not with that value, or it needs trainings.
    """
    make_searcher(name, Resources(net), budget, np.random.default_rng(0), options, can_train)


def history_of(name: str, net: Supernet) -> list[Any]:
    """Return the widths that trained best, if a searcher asks for them: its result then depends on them."""
    wanted = "history" in inspect.signature(SEARCHERS.get(name)).parameters
    return list(net.width_history.records) if wanted else []
