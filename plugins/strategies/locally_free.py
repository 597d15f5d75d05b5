"""Locally free: a width is its base channels and a few free ones near its end (CafeNet, Su et al. 2021)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from widthkit.errors import OptionError
from widthkit.graph import IntArray
from widthkit.graph.space import GroupChoices
from widthkit.supernet import Supernet
from widthkit.supernet.strategy import StepCost, Strategy, Units, train_path
from widthkit.train.step import StepContext

_MOST_OFFSET = 4
"""The largest offset in lockstep: C(9, 5) = 126 patterns run in a step, the next offset would run 462."""


@dataclass(frozen=True)
class LocallyFree(Strategy):
    """Base bins and free bins nearby, min-min training, max-max judging (CafeNet, Eq. 5 and 11-13).

    A group's choices cut its units into bins. Bin ``i`` holds the units of choice ``i`` that choice ``i - 1`` lacks,
    for FLOPs-sensitive bins and evenly spaced choices alike. The width of choice ``c`` (counted from 1) has
    ``max(c - r - 1, 0)`` base bins and, of the bins ``[c - r, c + r]``, ``r + 1`` free ones.

    Bins may differ in size, so patterns with the same number of bins may differ in units. A sub-network still has
    exactly its width: it takes base bins, then the pattern's free bins from the left, then the zone's other bins from
    the left, until the width is reached. With equal bins that is the pattern itself.

    Args:
        offset: ``r``, how far free bins may lie from the width's own.
        random_first: The paper's lambda. In this first share of the run a random pattern is trained; after it, the
            pattern of least loss.
        patterns: ``"lockstep"``: every layer has the same pattern, and all C(2r+1, r+1) are tried; ``"layerwise"``:
            every layer has its own, and ``samples`` combinations are tried.
        samples: How many layer-wise combinations a training step or a judgement tries.
    """

    offset: int = 1
    random_first: float = 0.0
    patterns: str = "lockstep"
    samples: int = 3

    def __post_init__(self) -> None:
        if self.offset < 0:
            raise OptionError(f"offset={self.offset}: it cannot be negative")
        if self.offset > _MOST_OFFSET and self.patterns == "lockstep":
            n = math.comb(2 * self.offset + 1, self.offset + 1)
            raise OptionError(
                f"offset={self.offset} stands for {n} patterns, each run in every step; take at most {_MOST_OFFSET}, "
                "or patterns='layerwise', which samples them"
            )
        if not 0 <= self.random_first <= 1:
            raise OptionError(f"random_first={self.random_first}: it is a share of the run, from 0 to 1")
        if self.patterns not in ("lockstep", "layerwise"):
            raise OptionError(f"patterns '{self.patterns}': locally-free knows 'lockstep' and 'layerwise'")
        if self.samples < 1:
            raise OptionError(f"samples={self.samples}: at least one combination must be tried")

    def capacity(self, choices: GroupChoices) -> int:
        """The widest choice."""
        return choices.widest

    def all_patterns(self, width: int, choices: GroupChoices) -> list[IntArray]:
        """List the units of the C(2r+1, r+1) patterns of a width; some are equal near both ends of a layer."""
        return [units.copy() for units in _patterns(width, choices, self.offset)]

    def paths(self, width: int, choices: GroupChoices) -> Sequence[IntArray]:
        """All patterns, or ``samples`` of them, which are the same at every call."""
        found = self.all_patterns(width, choices)
        if self.patterns == "lockstep":
            return found
        rng = np.random.default_rng(zlib.crc32(choices.name.encode()))
        return [found[int(i)] for i in rng.integers(len(found), size=self.samples)]

    def train_step(self, net: Supernet, step: StepContext) -> Tensor:
        """Train the candidate of a random width that has the least loss (Eq. 12), or at first a random one.

        The history records the loss of the trained candidate, not of the others.
        """
        rng = net.rng(step)
        widths = net.space.sample(rng)
        candidates = self._candidates(net, widths, rng)
        if step.progress < self.random_first:
            best = int(rng.integers(len(candidates)))
        else:
            best = _least_loss(net, step, candidates)
        loss = train_path(net, step, candidates[best])
        net.record(widths, loss)
        return loss

    def _candidates(self, net: Supernet, widths: dict[str, int], rng: np.random.Generator) -> list[dict[str, IntArray]]:
        if self.patterns == "lockstep":
            return net.paths(widths)
        tables = {g.name: self.all_patterns(widths[g.name], g) for g in net.space.groups}
        return [{n: t[int(rng.integers(len(t)))] for n, t in tables.items()} for _ in range(self.samples)]

    def combine(self, scores: Sequence[float]) -> float:
        """The best pattern's score (Eq. 13); one that is not a number counts only if all are."""
        numbers = [score for score in scores if not math.isnan(score)]
        return max(numbers) if numbers else math.nan

    @property
    def cost(self) -> StepCost:
        """Every candidate without gradients, the best one with them (the step after the random phase)."""
        if self.random_first >= 1:
            return StepCost(1, 1)
        n = math.comb(2 * self.offset + 1, self.offset + 1) if self.patterns == "lockstep" else self.samples
        return StepCost(n + 1, 1)


def _least_loss(net: Supernet, step: StepContext, candidates: Sequence[Units]) -> int:
    """Return the index of the candidate with the least loss: the first of equal ones, or if no loss is a number."""
    losses = []
    with torch.no_grad():
        for units in candidates:
            losses.append(step.loss(net.forward_on(units, step), step.targets).detach())
    values = torch.stack(losses).nan_to_num(nan=math.inf)
    return int(values.argmin())


@lru_cache(maxsize=4096)
def _patterns(width: int, choices: GroupChoices, offset: int) -> tuple[IntArray, ...]:
    """Units of every pattern, in the order of :func:`itertools.combinations`."""
    edges = np.array((0, *choices.options))
    own = int(np.searchsorted(edges, width))
    last = len(edges) - 1
    base = max(own - offset - 1, 0)
    zone = range(base + 1, min(own + offset, last) + 1)
    found = []
    for offsets in combinations(range(-offset, offset + 1), offset + 1):
        free = _clipped([own + o for o in offsets], own - base, zone)
        order = [*range(1, base + 1), *free, *(b for b in zone if b not in free)]
        units = np.concatenate([np.arange(edges[b - 1], edges[b]) for b in order])[:width]
        found.append(np.sort(units).astype(np.int64))
    return tuple(found)


def _clipped(bins: list[int], count: int, zone: range) -> list[int]:
    """Fit a pattern to the ends of a layer: drop bins below the first, replace bins past the last by the last unused.

    Every subset of ``count`` bins of the zone comes from at least one pattern.
    """
    inside = [b for b in bins if b in zone][:count]
    spare = [b for b in reversed(zone) if b not in inside]
    return sorted(inside + spare[: count - len(inside)])
