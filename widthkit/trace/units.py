"""Group components into channel groups: units that occur equally often at the same tensor dims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import nn

from widthkit.graph import IntArray, Positions
from widthkit.trace.components import Components
from widthkit.trace.labels import Labels
from widthkit.trace.tensor_labels import TensorLabels


@dataclass(frozen=True)
class Units:
    """Which group every component belongs to.

    Args:
        names: Name of every group.
        widths: ``[groups]``; units of every group.
        group: ``[components]``; the group of every component, -1 where it is fixed.
        rank: ``[components]``; which unit of its group a component is, 0 where it is fixed.
        single: Component -> why it is fixed although nothing freezes it: it would be the only unit of its group.
    """

    names: tuple[str, ...]
    widths: IntArray
    group: IntArray
    rank: IntArray
    single: Mapping[int, str]

    def positions(self, components: IntArray) -> Positions:
        """Return the group and the rank of every given component."""
        group = self.group[components]
        return Positions(group, np.where(group >= 0, self.rank[components], 0))


@dataclass(frozen=True)
class _Columns:
    """The components along every labelled dim of every tensor, and of every part that an operator cuts off a dim.

    Args:
        sites: Tensor name and dim of every column that is a dim of a tensor; these come first.
        components: Per column ``[size of the dim or part]``.
        in_parameters: Columns that belong to parameters, not to buffers.
        producers: Columns that are the output dim of a weight matrix or kernel.
    """

    sites: list[tuple[str, int]]
    components: list[IntArray]
    in_parameters: set[int]
    producers: set[int]

    @classmethod
    def of(cls, model: nn.Module, tensor_labels: TensorLabels, solved: Components, cuts: Sequence[Labels]) -> _Columns:
        parameters = {name for name, _ in model.named_parameters()}
        labelled = [(n, d, x) for n, dims in tensor_labels.items() for d, x in enumerate(dims) if x is not None]
        sites = [(name, dim) for name, dim, _ in labelled]
        in_parameters = {i for i, (name, _) in enumerate(sites) if name in parameters}
        producers = {i for i in in_parameters if _is_output(tensor_labels[sites[i][0]], sites[i][1])}
        parts = {part.tobytes(): part for part in (solved.unit[labels] for labels in cuts)}
        columns = [solved.unit[labels] for _, _, labels in labelled] + list(parts.values())
        return cls(sites, columns, in_parameters, producers)

    def group_name(self, columns: list[int], taken: list[str]) -> str:
        """Name a group after the first module that produces it."""
        first = next((i for i in columns if i in self.producers), columns[0])
        tensor = self.sites[first][0]
        return _unique_name(tensor.rpartition(".")[0] or tensor, taken)


def group_units(
    model: nn.Module, tensor_labels: TensorLabels, solved: Components, cuts: Sequence[Labels] = ()
) -> Units:
    """Put components that occur equally often at the same tensor dims, and in the same parts of dims, into one group.

    Args:
        model: The copy that was run.
        tensor_labels: The labels of its tensors.
        solved: Which labels belong to one component, and which components are frozen.
        cuts: Labels of the parts that operators cut off a dim.
    """
    n = int(solved.unit.max()) + 1
    group = np.full(n, -1, dtype=np.int64)
    rank = np.zeros(n, dtype=np.int64)
    single: dict[int, str] = {}
    names: list[str] = []
    widths: list[int] = []
    table = _Columns.of(model, tensor_labels, solved, cuts)
    for columns, components in _members(table, n, solved.frozen):
        name = table.group_name(columns, names)
        if len(components) == 1:
            single[int(components[0])] = f"{name}: everything here is coupled into a single unit"
            continue
        group[components] = len(names)
        rank[components] = np.arange(len(components))
        names.append(name)
        widths.append(len(components))
    return Units(tuple(names), np.array(widths, dtype=np.int64), group, rank, single)


def _is_output(labels: tuple[Labels | None, ...], dim: int) -> bool:
    """Whether a dim is the output of a weight matrix or kernel; vectors such as biases only follow channels."""
    return dim == 0 and any(other is not None for other in labels[1:])


def _members(table: _Columns, n: int, frozen: npt.NDArray[np.bool_]) -> list[tuple[list[int], IntArray]]:
    """Return ``(columns, components)`` of every group, both in the order of the model's tensors.

    Args:
        table: Where components occur.
        n: How many components there are.
        frozen: ``[components]``; frozen ones, and those in no parameter, belong to no group.
    """
    if not table.components:
        return []
    column = np.concatenate([np.full(len(c), i, dtype=np.int64) for i, c in enumerate(table.components)])
    components = np.concatenate(table.components)
    n_columns = len(table.components)
    first_seen = np.full(n, np.iinfo(np.int64).max, dtype=np.int64)
    # Of repeated indices NumPy keeps the last value. In reverse order that is the first occurrence.
    first_seen[components[::-1]] = np.arange(len(components))[::-1]
    pairs, counts = np.unique(components * n_columns + column, return_counts=True)
    owner, place = pairs // n_columns, pairs % n_columns
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    groups: dict[bytes, tuple[list[int], list[int]]] = {}
    for start, stop in zip(starts, [*starts[1:], len(owner)], strict=True):
        component = int(owner[start])
        own = place[start:stop]
        if frozen[component] or not table.in_parameters.intersection(own.tolist()):
            continue
        key = own.tobytes() + b"|" + counts[start:stop].tobytes()
        groups.setdefault(key, (own.tolist(), []))[1].append(component)
    ordered = [(own, np.array(sorted(m, key=lambda c: first_seen[c]))) for own, m in groups.values()]
    return sorted(ordered, key=lambda item: int(first_seen[item[1][0]]))


def _unique_name(name: str, taken: list[str]) -> str:
    """Number the groups that start at the same module: ``conv``, ``conv:2``...

    >>> _unique_name("conv", ["conv"])
    'conv:2'
    """
    numbered, count = name, 1
    while numbered in taken:
        count += 1
        numbered = f"{name}:{count}"
    return numbered
