"""Labels: one integer for every position of every tensor dim, and what a run records about them.

A tensor carries, per dim, either ``None`` (a fixed size: batch, space, time) or an array ``[size]`` of labels. Rules
record *ties* (positions that are kept or dropped together), *freezes* (positions that are never dropped, with a reason)
and *choices* (a shape demand that can be met in several ways, such as a view that splits 384 channels into 6 heads of
64).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]
Dims = tuple["Labels | None", ...]

CONSTANT = 0
"""The label of positions that belong to no tensor of the model, such as the zeros that padding adds."""


def unique(values: Labels, n: int) -> Labels:
    """Return the distinct values, sorted; all are below ``n``. For many values this is far faster than ``np.unique``.

    >>> unique(np.array([3, 1, 3]), 4).tolist()
    [1, 3]
    """
    if values.size * 16 < n:
        return np.unique(values)
    present = np.zeros(n, dtype=bool)
    present[values] = True
    return np.flatnonzero(present)


@dataclass(frozen=True)
class Alternative:
    """One way to meet a shape demand.

    Args:
        name: What varies under it, for messages, such as ``"groups"``.
        ties: Pairs of equally long label arrays.
        freezes: Label arrays that are frozen when the solver takes this alternative.
    """

    name: str
    ties: tuple[tuple[Labels, Labels], ...]
    freezes: tuple[Labels, ...] = ()


@dataclass(frozen=True)
class Choice:
    """A shape demand with alternatives; the solver takes the one that leaves the most units free.

    Args:
        path: Path of the module that makes the demand.
        where: Module, operator and demand, for reasons and messages.
        alternatives: Ways to meet it.
    """

    path: str
    where: str
    alternatives: tuple[Alternative, ...]


@dataclass
class LabelStore:
    """Hands out labels and collects ties, freezes and choices in the order of the traced run.

    Args:
        size: How many labels there are; the next new label.
        ties: Pairs of label arrays that are tied element by element.
        freezes: Frozen labels and the reason.
        choices: Shape demands that can be met in several ways.
        solved: The last result of :func:`widthkit.trace.components.solve`, and what it was computed from.
    """

    size: int = 1
    ties: list[tuple[Labels, Labels]] = field(default_factory=list)
    freezes: list[tuple[Labels, str]] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    solved: Any = field(default=None, repr=False)

    @property
    def state(self) -> tuple[int, ...]:
        """Sizes of all collections: it changes whenever something is recorded."""
        return self.size, len(self.ties), len(self.freezes), len(self.choices)

    def __post_init__(self) -> None:
        self.freeze(np.array([CONSTANT]), "constant padding")

    def new(self, size: int) -> Labels:
        """Return ``[size]`` fresh labels."""
        labels = np.arange(self.size, self.size + size, dtype=np.int64)
        self.size += size
        return labels

    def tie(self, a: Labels, b: Labels, reason: str = "meets constant padding") -> None:
        """Tie ``a[i]`` with ``b[i]``.

        Labels that meet the constant are frozen for ``reason``. A tie would connect all labels that meet the constant.
        """
        assert a.shape == b.shape, (a.shape, b.shape)
        if a is b or not a.size:
            return
        is_label = (a != CONSTANT) & (b != CONSTANT)
        if not is_label.all():
            self.freeze(np.concatenate([a[~is_label], b[~is_label]]), reason)
            a, b = a[is_label], b[is_label]
        differ = a != b
        if differ.any():
            self.ties.append((a[differ], b[differ]))

    def freeze(self, labels: Labels, reason: str) -> None:
        """Freeze positions: they are never dropped; the reason is shown to users."""
        if labels.size:
            self.freezes.append((unique(labels, self.size), reason))

    def choose(self, path: str, where: str, alternatives: Iterable[Alternative]) -> None:
        """Record a shape demand of the module at ``path`` that can be met in several ways."""
        options = tuple(alternatives)
        if len(options) == 1:
            for a, b in options[0].ties:
                self.tie(a, b)
            for labels in options[0].freezes:
                self.freeze(labels, where)
        else:
            self.choices.append(Choice(path, where, options))
