"""How evenly the sub-networks of a space use the units of a supernet."""

from __future__ import annotations

import numpy as np

from widthkit.graph import IntArray
from widthkit.graph.space import GroupChoices, SearchSpace
from widthkit.supernet.strategy import Strategy


def unit_uses(strategy: Strategy, choices: GroupChoices) -> IntArray:
    """Return ``[capacity]``: by how many paths of all choices every unit is used (BCNet, Eq. 6 and 9, cardinality).

    Args:
        strategy: Says which units stand for a width.
        choices: The group.
    """
    uses = np.zeros(strategy.capacity(choices), dtype=np.int64)
    for width in choices.options:
        for units in strategy.paths(width, choices):
            uses[units] += 1
    return uses


def unevenness(strategy: Strategy, space: SearchSpace) -> dict[str, float]:
    """Return group name -> largest over smallest use of its units; 1 where all are used equally often.

    Units that no choice uses are left out.

    Args:
        strategy: Says which units stand for a width.
        space: The choices.

    >>> from torch import nn
    >>> from widthkit.graph.space import uniform_space
    >>> from widthkit.supernet.strategy import make_strategy
    >>> from widthkit.trace import trace
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> space = uniform_space(trace(net, (1, 3, 8, 8)), k=4)
    >>> unevenness(make_strategy(None, {}), space)["0"] >= 1
    True
    """
    found = {}
    for choices in space.groups:
        uses = unit_uses(strategy, choices)
        uses = uses[uses > 0]
        found[choices.name] = float(uses.max() / uses.min())
    return found
