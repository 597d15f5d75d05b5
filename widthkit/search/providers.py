"""What a search offers to searchers that ask for more than space, budget and generator.

A searcher whose constructor has a parameter of one of these names gets it filled in, unless the user gives a value.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from widthkit.search.evaluator import Loss
from widthkit.supernet import Supernet
from widthkit.supernet.ranking import unit_scores


@dataclass(frozen=True)
class Offer:
    """What is at hand when a search begins.

    Args:
        net: The supernet; not trained yet when a run is only checked.
        data: Held-out batches ``(inputs, targets)``, where there are any yet.
        loss: The criterion; cross entropy where there is none.
    """

    net: Supernet
    data: Iterable[Any] | None = None
    loss: Loss | None = None


Importance = Callable[[str], Mapping[str, npt.NDArray[np.float64]]]
"""Criterion -> group name -> ``[units]``: importance of the supernet's units."""


def _importance(offer: Offer) -> Importance:
    net = offer.net
    return lambda criterion: unit_scores(net.model, net.wide_graph, criterion, data=offer.data, loss=offer.loss)


PROVIDERS: dict[str, Callable[[Offer], Any]] = {
    "importance": _importance,
    "history": lambda offer: offer.net.width_history.records,
}
"""Name of a constructor's parameter -> what makes its value."""


def provided(cls: type, offer: Offer, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a searcher's class asks for by name and the user has not given."""
    wanted = inspect.signature(cls).parameters
    return {name: make(offer) for name, make in PROVIDERS.items() if name in wanted and name not in given}
