"""Run a model at smaller widths, on slices of its own tensors.

Two things make a sub-network as cheap as a dense one. A slice is copied once, compactly, so that kernels read dense
memory in forward and backward. Its gradient is added straight into that part of the parameter's ``.grad``; the plain
autograd of slicing fills a zero tensor of the full size for every slice and adds that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from widthkit.graph import IntArray
from widthkit.graph.plan import Plan, set_attribute
from widthkit.modules.clone import all_names

Spec = tuple[tuple[int, "slice | Tensor"], ...]
"""Per dim a contiguous slice or an index tensor."""


def spec_of(dims: Mapping[int, IntArray]) -> Spec:
    """Turn index arrays into slices where they are contiguous.

    >>> import numpy as np
    >>> spec_of({0: np.array([2, 3, 4])})
    ((0, slice(2, 5, None)),)
    """
    found: list[tuple[int, slice | Tensor]] = []
    for dim, index in sorted(dims.items()):
        first, last = int(index[0]), int(index[-1])
        if last - first + 1 == len(index):
            found.append((dim, slice(first, last + 1)))
        else:
            # Prepared slices are kept: those first used in inference mode serve training later.
            with torch.inference_mode(False):
                found.append((dim, torch.from_numpy(index)))
    return tuple(found)


def view(tensor: Tensor, spec: Spec) -> Tensor:
    """Return the part that the slices of a spec name; its index tensors are not applied."""
    for dim, where in spec:
        if isinstance(where, slice):
            tensor = tensor.narrow(dim, where.start, where.stop - where.start)
    return tensor


def gather(tensor: Tensor, spec: Spec) -> Tensor:
    """Return the part that a spec names: a view where slices suffice, else a copy."""
    part = view(tensor, spec)
    for dim, where in spec:
        if isinstance(where, Tensor):
            part = part.index_select(dim, where.to(part.device))
    return part


def add_into(target: Tensor, spec: Spec, value: Tensor) -> None:
    """Add ``value`` in place to the part of ``target`` that a spec names."""
    part = view(target, spec)
    indexed = [(dim, where.to(target.device)) for dim, where in spec if isinstance(where, Tensor)]
    if not indexed:
        part.add_(value)
    elif len(indexed) == 1:
        part.index_add_(indexed[0][0], indexed[0][1], value)
    else:
        copy_into(target, spec, gather(target, spec) + value)


def copy_into(target: Tensor, spec: Spec, value: Tensor) -> None:
    """Overwrite the part of ``target`` that a spec names by ``value``."""
    indexed = [(dim, where.to(target.device)) for dim, where in spec if isinstance(where, Tensor)]
    if indexed:
        _copy_indexed(view(target, spec), indexed, value)
    else:
        view(target, spec).copy_(value)


def _copy_indexed(part: Tensor, indexed: list[tuple[int, Tensor]], value: Tensor) -> None:
    if len(indexed) == 1:
        part.index_copy_(indexed[0][0], indexed[0][1], value)
        return
    (dim, where), *rest = indexed
    inner = part.index_select(dim, where)
    _copy_indexed(inner, rest, value)
    part.index_copy_(dim, where, inner)


class ParameterSlice(torch.autograd.Function):
    """A compact copy of a part of a parameter whose gradient flows into that part."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, spec: Spec, in_place: bool) -> Tensor:
        """Copy the part; ``in_place`` adds gradients to ``parameter.grad`` instead of returning them."""
        ctx.spec, ctx.in_place, ctx.parameter = spec, in_place, parameter
        part = gather(parameter.detach(), spec)
        return part.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        """Add the gradient of the part to the parameter's."""
        (grad,) = grads
        parameter: Tensor = ctx.parameter
        if ctx.in_place and parameter.is_leaf:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            add_into(parameter.grad, ctx.spec, grad.to(parameter.dtype))
            return None, None, None
        full = torch.zeros_like(parameter)
        add_into(full, ctx.spec, grad)
        return full, None, None


@dataclass(frozen=True)
class _Slot:
    """One place of a module tree that holds a tensor."""

    module: nn.Module
    table: dict[str, Any]
    key: str

    def get(self) -> Tensor:
        """Return the tensor that the place holds."""
        return self.table[self.key]  # type: ignore[no-any-return]

    def put(self, tensor: Tensor) -> None:
        """Let the place hold another tensor."""
        self.table[self.key] = tensor


@dataclass(frozen=True)
class _SlicedTensor:
    """One tensor that a plan narrows, with all places that hold it."""

    name: str
    slots: tuple[_Slot, ...]
    spec: Spec
    is_parameter: bool


@dataclass(frozen=True)
class PreparedSlices:
    """What a plan changes in a model; made by :meth:`SlicedModel.prepare`."""

    tensors: tuple[_SlicedTensor, ...]
    attributes: tuple[tuple[nn.Module, str, Mapping[int | None, int]], ...]

    @property
    def specs(self) -> dict[str, Spec]:
        """Name of each narrowed tensor -> the part that is kept."""
        return {sliced.name: sliced.spec for sliced in self.tensors}


class SlicedModel:
    """Runs a model at the widths of a plan, on slices of its own tensors.

    Args:
        model: The model; between runs it is whole.

    Attributes:
        in_place_gradients: Whether gradients of slices are added in place. Without this they flow through autograd at
            full size, which ``torch.autograd.grad`` and hooks on parameters need.
        autograd_below: Autograd itself slices parameters with fewer entries than this. It fills zeros of the full size
            but never enters Python, so it is the faster way for small ones.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.in_place_gradients = True
        self.autograd_below = 1 << 12
        self._slots = _slots(model)

    def prepare(self, plan: Plan) -> PreparedSlices:
        """Look up what :meth:`narrowed` changes, once per plan."""
        tensors = []
        for name, dims in plan.tensors.items():
            slots = self._slots[name]
            tensors.append(_SlicedTensor(name, slots, spec_of(dims), isinstance(slots[0].get(), nn.Parameter)))
        changes = [(self.model.get_submodule(path), name, v) for (path, name), v in plan.attributes.items()]
        return PreparedSlices(tuple(tensors), tuple(changes))

    @contextmanager
    def narrowed(self, prepared: PreparedSlices) -> Iterator[nn.Module]:
        """Let the model hold slices and the attributes that go with them; everything is put back on the way out."""
        undo: list[tuple[_Slot, Tensor]] = []
        copied_buffers: list[tuple[Tensor, Spec, Tensor]] = []
        attributes: list[tuple[nn.Module, str, Any]] = []
        try:
            for sliced in prepared.tensors:
                whole = sliced.slots[0].get()
                part = self._part(whole, sliced)
                if _is_copied(sliced) and any(slot.module.training for slot in sliced.slots):
                    copied_buffers.append((whole, sliced.spec, part))
                for slot in sliced.slots:
                    undo.append((slot, slot.get()))
                    slot.put(part)
            for module, name, values in prepared.attributes:
                attributes.append((module, name, set_attribute(module, name, values)))
            yield self.model
        finally:
            for slot, value in undo:
                slot.put(value)
            for module, name, old in reversed(attributes):
                setattr(module, name, old)
            with torch.no_grad():
                # Running statistics change in training; a view changes the whole, a copy does not.
                for whole, spec, part in copied_buffers:
                    copy_into(whole, spec, part)

    @contextmanager
    def replaced(self, new: Callable[[str, nn.Module, Tensor], Tensor]) -> Iterator[None]:
        """Let the model hold other tensors.

        Args:
            new: Returns the tensor for a tensor's first name, a module that holds it, and the tensor itself.
        """
        undo = []
        try:
            for name, slots in self._slots.items():
                old = slots[0].get()
                made = new(name, slots[0].module, old)
                for slot in slots:
                    undo.append((slot, old))
                    slot.put(made)
            yield
        finally:
            for slot, old in undo:
                slot.put(old)

    def _part(self, whole: Tensor, sliced: _SlicedTensor) -> Tensor:
        if not sliced.is_parameter:
            return gather(whole, sliced.spec)
        if not (whole.requires_grad and torch.is_grad_enabled()):
            return gather(whole.detach(), sliced.spec)
        if whole.numel() < self.autograd_below:
            return gather(whole, sliced.spec)
        return ParameterSlice.apply(whole, sliced.spec, self.in_place_gradients)  # type: ignore[no-any-return, no-untyped-call]


def _is_copied(sliced: _SlicedTensor) -> bool:
    """Whether the slice is a buffer that index tensors copy, and no view."""
    return not sliced.is_parameter and any(isinstance(where, Tensor) for _, where in sliced.spec)


def _slots(model: nn.Module) -> dict[str, tuple[_Slot, ...]]:
    """Map every tensor's first name to all the places that hold it; a module of several names is one place."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for first, names in all_names(model).items():
        slots: dict[tuple[int, str], _Slot] = {}
        for name in names:
            path, _, key = name.rpartition(".")
            module = modules[path]
            table: dict[str, Any] = module._parameters if key in module._parameters else module._buffers
            slots[id(table), key] = _Slot(module, table, key)
        found[first] = tuple(slots.values())
    return found
