"""The search space: which widths every group may take.

Uniform choices cut every group into K parts (AutoSlim, section 3.2; BCNet, section 3). FLOPs-sensitive bins give
groups that cost more per channel finer steps (CafeNet, Eq. 7-9).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from widthkit.errors import Option, OptionError, WidthsError, close_matches
from widthkit.graph.arrays import IntArray
from widthkit.graph.channel_graph import ChannelGraph

WidthLimit = int | float | str
"""A bound on widths: an int in units, or a ratio of the group's width as a float or text such as ``"0.5x"``."""


@dataclass(frozen=True)
class GroupChoices:
    """The widths one group may take.

    Args:
        name: The group.
        width: Units of the group in the model as it is.
        options: Allowed widths, ascending; the last is the widest.
    """

    name: str
    width: int
    options: tuple[int, ...]

    @property
    def widest(self) -> int:
        """The largest allowed width."""
        return self.options[-1]

    @property
    def narrowest(self) -> int:
        """The smallest allowed width."""
        return self.options[0]


@dataclass(frozen=True)
class SearchSpace:
    """The product of all groups' choices.

    Args:
        graph: The channel graph of the model.
        groups: One entry per group, in the graph's order.
        divisor: Widths are multiples of this, except the widest of a group and, where asked for, the model's own.

    >>> from torch import nn
    >>> from widthkit.trace import trace
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> space = uniform_space(trace(net, (1, 3, 8, 8)), k=4)
    >>> space.groups[0].options, space.size
    ((2, 4, 6, 8), 4)
    """

    graph: ChannelGraph
    groups: tuple[GroupChoices, ...]
    divisor: int = 1

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Group names, in the order of genes."""
        return tuple(g.name for g in self.groups)

    @property
    def size(self) -> int:
        """How many width vectors there are."""
        return math.prod(len(g.options) for g in self.groups)

    @property
    def largest(self) -> dict[str, int]:
        """Every group at its widest."""
        return {g.name: g.widest for g in self.groups}

    @property
    def smallest(self) -> dict[str, int]:
        """Every group at its narrowest."""
        return {g.name: g.narrowest for g in self.groups}

    def sample(self, rng: np.random.Generator) -> dict[str, int]:
        """Draw every group's width uniformly and independently."""
        return {g.name: int(g.options[rng.integers(len(g.options))]) for g in self.groups}

    def decode(self, genes: Sequence[int] | IntArray) -> dict[str, int]:
        """Turn indices into the choices (one per group) into widths."""
        return {g.name: g.options[int(i)] for g, i in zip(self.groups, genes, strict=True)}

    def encode(self, widths: Mapping[str, int]) -> IntArray:
        """Turn widths into indices ``[groups]``.

        Raises:
            WidthsError: If a width is not among its group's choices.
        """
        genes = []
        for g in self.groups:
            width = widths.get(g.name, g.width)
            if width not in g.options:
                raise WidthsError(f"group '{g.name}': width {width} is not among the choices {list(g.options)}")
            genes.append(g.options.index(width))
        unknown = set(widths) - set(self.names)
        if unknown:
            name = min(unknown)
            raise WidthsError(f"unknown channel group '{name}': {close_matches(name, self.names)}")
        return np.array(genes, dtype=np.int64)

    def narrower(self, widths: Mapping[str, int], name: str) -> dict[str, int] | None:
        """Return the widths with one group a step narrower, or ``None`` at its narrowest."""
        options = self.groups[self.names.index(name)].options
        at = options.index(widths[name])
        return {**widths, name: options[at - 1]} if at else None


def uniform_space(
    graph: ChannelGraph,
    k: int = 20,
    *,
    min_width: WidthLimit = 1,
    max_width: WidthLimit = "1x",
    divisor: int = 1,
    fixed: Mapping[str, int] | None = None,
    own_width: bool = False,
) -> SearchSpace:
    """Give every group K evenly spaced widths.

    Args:
        graph: The channel graph.
        k: Choices per group before limits and rounding (the papers take 10 or 20).
        min_width: Narrowest width: an int in units, or a ratio as a float or ``"0.15x"``.
        max_width: Widest width, in the same forms; above ``"1x"`` the supernet grows. An int never grows a group.
        divisor: Widths are multiples of this, except the widest (8 suits tensor cores).
        fixed: Group name -> the one width that it keeps.
        own_width: In a space that grows, let every group also take the model's own width, which need not be evenly
            spaced. Elsewhere that width is the widest.

    Raises:
        OptionError: If the options are out of range.
        WidthsError: If ``fixed`` names an unknown group, or a width that the group cannot have.
    """
    if k < 1:
        raise OptionError(Option("k", k), ": a group needs at least one choice")

    def steps(_: int, widest: int) -> list[float]:
        return [widest * i / k for i in range(1, k + 1)]

    return _space(graph, steps, min_width, max_width, divisor, fixed or {}, own_width)


def flops_bins(
    graph: ChannelGraph,
    beta: float = 1.0,
    *,
    min_width: WidthLimit = 1,
    max_width: WidthLimit = "1x",
    divisor: int = 1,
    fixed: Mapping[str, int] | None = None,
    own_width: bool = False,
) -> SearchSpace:
    """Give every group bins of about equal MACs: ``b_g = beta * max(eps) / eps_g`` channels (CafeNet, Eq. 9).

    Args:
        graph: The channel graph; ``eps_g`` is d MACs / d width of group g with every group at the space's widest.
        beta: Channels in a bin of the most sensitive group.
        min_width: As in :func:`uniform_space`.
        max_width: As in :func:`uniform_space`.
        divisor: As in :func:`uniform_space`.
        fixed: As in :func:`uniform_space`.
        own_width: As in :func:`uniform_space`.

    Raises:
        OptionError: If the options are out of range.
        WidthsError: If ``fixed`` names an unknown group, or a width that the group cannot have.
    """
    if not 0 < beta < math.inf:
        raise OptionError(Option("beta", beta), ": the smallest bin size must be a positive number")
    widest = _widest(graph, max_width, fixed or {})
    sizes = bin_sizes(graph, beta, widest)

    def steps(g: int, widest: int) -> list[float]:
        return [*range(int(sizes[g]), widest, int(sizes[g])), widest]

    return _space(graph, steps, min_width, max_width, divisor, fixed or {}, own_width)


def make_space(graph: ChannelGraph, *, k: int = 20, bins: float | None = None, **limits: Any) -> SearchSpace:
    """Return FLOPs-sensitive bins with beta ``bins``, or ``k`` evenly spaced widths where that is ``None``.

    Args:
        graph: The channel graph.
        k: As in :func:`uniform_space`.
        bins: As ``beta`` in :func:`flops_bins`.
        **limits: ``min_width``, ``max_width``, ``divisor``, ``fixed`` and ``own_width``.

    Raises:
        OptionError: If the options are out of range.
        WidthsError: If ``fixed`` names an unknown group, or a width that the group cannot have.
    """
    return uniform_space(graph, k, **limits) if bins is None else flops_bins(graph, bins, **limits)


def bin_sizes(graph: ChannelGraph, beta: float = 1.0, widest: IntArray | None = None) -> IntArray:
    """Return ``[groups]``: channels per bin, at least 1 and at most the group's widest (CafeNet, Eq. 9).

    Args:
        graph: The channel graph.
        beta: Channels in a bin of the most sensitive group.
        widest: ``[groups]``: widths at which the sensitivity is taken; the model's own by default.
    """
    widest = graph.group_widths if widest is None else widest
    sensitivity = graph.sensitivity(widest)
    if not len(sensitivity):
        return np.zeros(0, dtype=np.int64)
    sizes = np.full(len(sensitivity), np.inf)  # a group without MACs is one bin
    np.divide(beta * sensitivity.max(), sensitivity, out=sizes, where=sensitivity > 0)
    clipped = np.clip(np.rint(np.minimum(sizes, widest)), 1, widest)
    return np.asarray(clipped, dtype=np.int64)


def _widest(graph: ChannelGraph, max_width: WidthLimit, fixed: Mapping[str, int]) -> IntArray:
    """Return ``[groups]``: every group's widest choice."""
    widths = {name: resolve_limit(max_width, width) for name, width in graph.full.items()}
    kept = {n: _fixed_width(n, fixed[n], max(graph.full[n], widest)) for n, widest in widths.items() if n in fixed}
    return np.array(list({**widths, **kept}.values()), dtype=np.int64)


def _space(
    graph: ChannelGraph,
    steps: Callable[[int, int], Iterable[float]],
    min_width: WidthLimit,
    max_width: WidthLimit,
    divisor: int,
    fixed: Mapping[str, int],
    own_width: bool,
) -> SearchSpace:
    if divisor < 1:
        raise OptionError(Option("divisor", divisor), ": it must be at least 1")
    unknown = sorted(set(fixed) - set(graph.group_names))
    if unknown:
        raise WidthsError(f"unknown channel group '{unknown[0]}': {close_matches(unknown[0], graph.group_names)}")
    groups = []
    for g, (name, width) in enumerate(graph.full.items()):
        low, high = resolve_limit(min_width, width), resolve_limit(max_width, width)
        if low > high:
            raise OptionError(
                f"group '{name}': ", Option("min_width", min_width), " exceeds ", Option("max_width", max_width)
            )
        options = {round(step / divisor) * divisor for step in steps(g, high)}
        options = {o for o in options if max(low, 1) <= o <= high} | {high}
        if (_number(min_width) if isinstance(min_width, str) else min_width) != 1 and low % divisor == 0:
            options.add(low)
        if own_width and low <= width <= high:
            options.add(width)
        if name in fixed:
            options = {_fixed_width(name, fixed[name], max(width, high))}
        groups.append(GroupChoices(name, width, tuple(sorted(options))))
    return SearchSpace(graph, tuple(groups), divisor)


def _fixed_width(name: str, width: Any, widest: int) -> int:
    if not isinstance(width, (int, np.integer)) or isinstance(width, bool) or not 1 <= width <= widest:
        raise WidthsError(f"group '{name}': fixed width {width!r} is not an int from 1 to {widest}")
    return int(width)


def resolve_limit(limit: WidthLimit, width: int) -> int:
    """Turn a limit into units: an int as it is (at most the width), a float or ``"0.5x"`` as a ratio of the width.

    >>> resolve_limit("1.5x", 64), resolve_limit(0.25, 64), resolve_limit(8, 64), resolve_limit("8", 4)
    (96, 16, 8, 4)

    Raises:
        OptionError: If the limit cannot be read or is not positive.
    """
    number = _number(limit) if isinstance(limit, str) else limit
    if not 0 < number < math.inf:
        raise OptionError(f"width limit {limit} must be positive and finite")
    units = min(number, width) if isinstance(number, int) else round(number * width)
    return max(1, int(units))


def _number(text: str) -> int | float:
    """Read ``"8"`` as units; ``"0.5"`` and ``"2x"`` as ratios."""
    try:
        return int(text) if text.strip().isdecimal() else float(text.strip().removesuffix("x"))
    except ValueError:
        raise OptionError(f"width limit '{text}' is neither a number of channels nor a ratio like '0.5x'") from None
