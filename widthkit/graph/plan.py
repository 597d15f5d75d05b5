"""From widths to a plan, and from a plan to a model: everything is checked on pure data before a tensor is copied.

``make_plan`` says which indices of every tensor dim are kept and which integer attributes change. ``apply_plan`` makes
a new model from it. The index -1 stands for a new channel (growing).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from widthkit.errors import WidthsError, close_matches
from widthkit.graph.arrays import IntArray
from widthkit.graph.channel_graph import ChannelGraph, Kept, Positions
from widthkit.graph.new_channels import initialise_new
from widthkit.modules.clone import clone_with, named_tensors

KeptUnits = dict[str, IntArray]


@dataclass(frozen=True)
class Plan:
    """What happens to every tensor and attribute.

    Args:
        widths: Group name -> how many units are kept.
        kept: Group name -> the kept units, ascending; units past the group's width are new.
        tensors: Tensor name -> dim -> indices along that dim, -1 for a new entry. Unchanged dims are left out.
        attributes: (module, attribute) -> new value.
        shapes: Tensor name -> shape that the plan expects.
    """

    widths: Mapping[str, int]
    kept: Mapping[str, IntArray] = field(repr=False)
    tensors: Mapping[str, Mapping[int, IntArray]] = field(repr=False)
    attributes: Mapping[tuple[str, str], Mapping[int | None, int]] = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    @property
    def grows(self) -> bool:
        """Whether any tensor gets new entries."""
        return any((index < 0).any() for dims in self.tensors.values() for index in dims.values())


def kept_units(graph: ChannelGraph, widths: Kept | None) -> KeptUnits:
    """Turn widths or explicit units into ascending unit indices per group.

    Args:
        graph: The channel graph.
        widths: Group name -> a width (the first units are kept) or the kept units themselves. Groups that are not
            named stay whole. A width above the group's own grows it.

    Raises:
        WidthsError: If a name is unknown, a width is below 1, or units repeat or are negative.
    """
    kept = {name: np.arange(width) for name, width in graph.full.items()}
    for name, value in (widths or {}).items():
        if name not in kept:
            raise WidthsError(f"unknown channel group '{name}': {close_matches(name, kept)}")
        kept[name] = _units(name, value)
    return kept


def _units(name: str, value: Any) -> IntArray:
    if isinstance(value, (bool, float, str)):
        raise WidthsError(f"group '{name}': {value!r} is neither a width (an int) nor a sequence of units")
    if isinstance(value, (int, np.integer)):
        if value < 1:
            raise WidthsError(f"group '{name}': width {value} is below 1; every group keeps at least one unit")
        return np.arange(int(value))
    units = np.asarray(value)
    if units.ndim != 1 or not len(units) or not np.issubdtype(units.dtype, np.integer):
        raise WidthsError(f"group '{name}': kept units must be a non-empty sequence of ints, not {value!r}")
    ordered = np.unique(units).astype(np.int64)
    if len(ordered) != len(units) or ordered[0] < 0:
        raise WidthsError(f"group '{name}': kept units must be distinct and not negative")
    return ordered


def make_plan(graph: ChannelGraph, widths: Kept | None = None) -> Plan:
    """Plan what happens to every tensor when each group keeps the given units.

    Args:
        graph: The channel graph of the model.
        widths: Group name -> width or kept units; see :func:`kept_units`.

    Raises:
        WidthsError: If the widths do not fit the graph.
    """
    kept = kept_units(graph, widths)
    table = KeptTable.of(graph, kept)
    tensors: dict[str, dict[int, IntArray]] = {}
    for info in graph.tensors.values():
        for dim, positions in enumerate(info.dims):
            if positions is not None and table.touches(positions):
                tensors.setdefault(info.name, {})[dim] = table.indices(positions)
    attributes: dict[tuple[str, str], dict[int | None, int]] = {}
    for attribute in graph.attributes:
        if table.touches(attribute.positions):
            key = (attribute.module, attribute.name)
            attributes.setdefault(key, {})[attribute.element] = len(table.indices(attribute.positions))
    shapes = {name: info.shape for name, info in graph.tensors.items()}
    return Plan({n: len(k) for n, k in kept.items()}, kept, tensors, attributes, shapes)


@dataclass(frozen=True)
class KeptTable:
    """Which units of all groups are kept, in one flat array, so that one lookup answers for a whole dim.

    Args:
        flags: ``[sum of widths]``; whether each unit is kept.
        start: ``[groups]``; where each group begins in ``flags``.
        changed: ``[groups + 1]``; whether a group loses or gains units; the last entry stands for fixed positions.
        new: ``[groups]``; how many units each group gains.
        width: ``[groups]``; units of each group.
    """

    flags: np.ndarray[Any, np.dtype[np.bool_]]
    start: IntArray
    changed: np.ndarray[Any, np.dtype[np.bool_]]
    new: IntArray
    width: IntArray

    @classmethod
    def of(cls, graph: ChannelGraph, kept: KeptUnits) -> KeptTable:
        """Build the table from the kept units of every group."""
        width = graph.group_widths
        start = np.concatenate([[0], np.cumsum(width)[:-1]]).astype(np.int64) if len(width) else width
        flags = np.zeros(int(width.sum()), dtype=bool)
        new = np.zeros(len(width), dtype=np.int64)
        changed = np.zeros(len(width) + 1, dtype=bool)
        for g, name in enumerate(graph.group_names):
            own = kept[name][kept[name] < width[g]]
            flags[start[g] + own] = True
            new[g] = len(kept[name]) - len(own)
            changed[g] = new[g] > 0 or len(own) < width[g]
        return cls(flags, start, changed, new, width)

    def touches(self, positions: Positions) -> bool:
        """Whether any of these positions belongs to a group that changes."""
        return bool(self.changed[positions.group].any())

    def indices(self, positions: Positions) -> IntArray:
        """Return the kept positions in their order, with -1 where new units are inserted."""
        here = self._kept(positions)
        if not self.new.any():
            return here
        return np.array([old for old, _, _ in self._inserted(positions, here)], dtype=np.int64)

    def grown(self, positions: Positions) -> Positions:
        """Return the positions after the change: kept units keep their ranks, new ones get ranks past the last."""
        entries = self._inserted(positions, self._kept(positions))
        return Positions(
            np.array([g for _, g, _ in entries], dtype=np.int64), np.array([r for _, _, r in entries], dtype=np.int64)
        )

    def _kept(self, positions: Positions) -> IntArray:
        fixed = positions.group < 0
        slot = np.where(fixed, 0, self.start[positions.group] + positions.rank)
        return np.flatnonzero(fixed | self.flags[slot]).astype(np.int64)

    def _inserted(self, positions: Positions, here: IntArray) -> list[tuple[int, int, int]]:
        """List ``(old position or -1, group, rank)`` of every kept or new position.

        New units follow every run of positions of the last unit. A new entry of head 1 comes after the last entry of
        head 1; the 49 positions of a new flattened channel come after those of the last channel.
        """
        group, rank = positions.group, positions.rank
        entries = [(int(p), 0, int(p), int(group[p]), int(rank[p])) for p in here]
        for g in np.unique(group[group >= 0]).tolist():
            last = np.flatnonzero((group == g) & (rank == self.width[g] - 1))
            for run in np.split(last, np.flatnonzero(np.diff(last) != 1) + 1):
                for unit in range(int(self.new[g])):
                    entries += [(int(run[-1]), 1, -1, g, int(self.width[g]) + unit)] * len(run)
        return [(old, g, r) for _, _, old, g, r in sorted(entries, key=lambda entry: entry[:2])]


def apply_plan(model: nn.Module, plan: Plan, *, seed: int = 0, initialise: bool = True) -> nn.Module:
    """Return a new, dense model that the plan describes; the input is untouched.

    Args:
        model: The model that the plan's graph was traced from.
        plan: From :func:`make_plan`.
        seed: Seeds the initial values of new channels; the global random state is left as it was.
        initialise: Give new channels initial values; ``False`` leaves zeros, for callers that load weights.

    Raises:
        WidthsError: If the plan was made for a model of other shapes.
    """
    check_shapes(model, plan)
    slim = clone_with(model, lambda name, tensor: take(tensor.detach(), plan.tensors.get(name, {})))
    for (path, name), values in plan.attributes.items():
        set_attribute(slim.get_submodule(path), name, values)
    if plan.grows and initialise:
        initialise_new(slim, plan.tensors, seed)
    return slim


def check_shapes(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan that belongs to another model.

    Raises:
        WidthsError: Naming the first tensor that differs.
    """
    own = named_tensors(model)
    for name, shape in plan.shapes.items():
        if name not in own:
            raise WidthsError(f"the plan names '{name}', which {type(model).__name__} does not have; trace this model")
        # Some models replace buffers while they run. Buffers that the plan does not change may have any shape.
        is_checked = name in plan.tensors or isinstance(own[name], nn.Parameter)
        if is_checked and tuple(own[name].shape) != shape:
            raise WidthsError(
                f"'{name}' has shape {tuple(own[name].shape)}, the plan expects {shape}; trace this model again"
            )


def take(tensor: Tensor, dims: Mapping[int, IntArray]) -> Tensor:
    """Return a copy with the given indices along each dim; new entries (-1) hold zeros.

    >>> take(torch.arange(6.0).reshape(2, 3), {1: np.array([0, 2, -1])})
    tensor([[0., 2., 0.],
            [3., 5., 0.]])
    """
    copied = False
    for dim, index in dims.items():
        where = torch.from_numpy(np.maximum(index, 0)).to(tensor.device)
        tensor = tensor.index_select(dim, where)
        copied = True
        if (index < 0).any():
            mask_shape = [1] * tensor.ndim
            mask_shape[dim] = -1
            tensor = tensor * torch.from_numpy(index >= 0).to(tensor.device).reshape(mask_shape)
    return tensor if copied else tensor.clone()


def set_attribute(module: nn.Module, name: str, values: Mapping[int | None, int]) -> Any:
    """Set an integer attribute, or elements of a tuple or list attribute; return the old value."""
    old = getattr(module, name)
    if None in values:
        setattr(module, name, values[None])
    else:
        items = list(old)
        for element, value in values.items():
            items[element] = value  # type: ignore[index]
        setattr(module, name, type(old)(items))
    return old
