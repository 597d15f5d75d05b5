"""How many units a supernet holds for every group, and which unit of a ranked model goes to which place."""

from __future__ import annotations

import numpy as np

from widthkit.errors import Option, OptionError, PluginError
from widthkit.graph import IntArray
from widthkit.graph.space import SearchSpace
from widthkit.supernet.ranking import Scores, rankings
from widthkit.supernet.strategy import Strategy


def capacities(space: SearchSpace, strategy: Strategy) -> dict[str, int]:
    """Return the units that a supernet holds for every group.

    Raises:
        PluginError: If the strategy gives something else than a whole number.
        OptionError: If it gives fewer units than the group's widest choice has.
    """
    found = {}
    for choices in space.groups:
        capacity = strategy.capacity(choices)
        if not isinstance(capacity, (int, np.integer)) or isinstance(capacity, bool):
            raise PluginError(
                f"strategy {type(strategy).__name__}: capacity() of group '{choices.name}' must be a whole number, "
                f"not {capacity!r}"
            )
        if capacity < choices.widest:
            raise OptionError(
                f"strategy {type(strategy).__name__} gives group '{choices.name}' {capacity} units, "
                f"fewer than its widest choice {choices.widest}"
            )
        found[choices.name] = max(capacity, choices.width)
    return found


def unit_orders(space: SearchSpace, strategy: Strategy, scores: Scores) -> dict[str, IntArray]:
    """Return, for every group, the unit that comes to each place, as :meth:`Strategy.order` says.

    Raises:
        OptionError: If the scores do not fit the groups, or the strategy's order does not.
    """
    ranked = rankings(scores)
    orders = {}
    for choices in space.groups:
        ranking = ranked.get(choices.name)
        if ranking is None or len(ranking) != choices.width:
            raise OptionError(Option("rank"), f" needs {choices.width} scores for group '{choices.name}'")
        order = np.asarray(strategy.order(ranking, choices))
        capacity = max(strategy.capacity(choices), choices.width)
        fits = order.ndim == 1 and choices.width <= len(order) <= capacity
        if not fits or set(order[: choices.width]) != set(range(choices.width)):
            raise OptionError(
                f"strategy {type(strategy).__name__}: order() of group '{choices.name}' must name each of its "
                f"{choices.width} units once, then at most {capacity - choices.width} copies"
            )
        orders[choices.name] = order
    return orders
