"""Build searchers by name, with what they ask for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from widthkit.budget import Budget
from widthkit.search.providers import Offer, provided
from widthkit.search.searcher import SEARCHERS, Searcher
from widthkit.supernet import Supernet


def make_searcher(
    name: str,
    net: Supernet,
    budget: Budget,
    rng: np.random.Generator,
    options: Mapping[str, Any],
    offer: Offer | None = None,
) -> Searcher:
    """Build a registered searcher for a supernet's space, with what it asks for of an offer.

    Raises:
        PluginError: If no searcher has that name.
        OptionError: If it does not take one of the options, or not with that value.
    """
    offered = provided(SEARCHERS.get(name), offer or Offer(net), options)
    return SEARCHERS.build(name, options, net.space, budget, rng, offered=offered)  # type: ignore[no-any-return]


def history_of(name: str, net: Supernet) -> dict[str, Any]:
    """Return the widths that trained best, if a searcher asks for them: its result then depends on them."""
    wanted = "history" in inspect.signature(SEARCHERS.get(name)).parameters
    return {"history": net.width_history.records} if wanted else {}
