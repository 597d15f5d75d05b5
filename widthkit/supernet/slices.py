"""Borrowed slices: run a model at smaller widths on parts of its own tensors.

Two things make a sub-network as cheap as a dense one. A slice is copied once, compactly, so that kernels read dense
memory in forward and backward. And its gradient is added straight into that part of the parameter's ``.grad``; the
plain autograd of slicing would fill a zero tensor of the full size for every slice and add that.
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

_SMALL = 1 << 12
"""Below this size autograd's own slicing, which fills zeros but never enters Python, is the faster of the two."""

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
            # Plans are kept: one that was first used while judging must serve training later.
            with torch.inference_mode(False):
                found.append((dim, torch.from_numpy(index)))
    return tuple(found)


def view(tensor: Tensor, spec: Spec) -> Tensor:
    """Return the part that the slices of a spec name; index tensors are left for later."""
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
        _write_back(view(target, spec), indexed, value)
    else:
        view(target, spec).copy_(value)


def _write_back(part: Tensor, indexed: list[tuple[int, Tensor]], value: Tensor) -> None:
    if len(indexed) == 1:
        part.index_copy_(indexed[0][0], indexed[0][1], value)
        return
    (dim, where), *rest = indexed
    inner = part.index_select(dim, where)
    _write_back(inner, rest, value)
    part.index_copy_(dim, where, inner)


class Borrow(torch.autograd.Function):
    """A compact copy of a part of a parameter whose gradient flows into that part."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, spec: Spec, direct: bool) -> Tensor:
        """Copy the part; ``direct`` adds gradients into ``parameter.grad`` instead of returning them."""
        ctx.spec, ctx.direct, ctx.parameter = spec, direct, parameter
        part = gather(parameter.detach(), spec)
        return part.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        """Add the gradient of the part to the parameter's."""
        (grad,) = grads
        parameter: Tensor = ctx.parameter
        if ctx.direct and parameter.is_leaf:
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


@dataclass(frozen=True)
class _Loan:
    """One tensor that a plan narrows, everywhere it is held."""

    name: str
    slots: tuple[_Slot, ...]
    spec: Spec
    is_parameter: bool


class Borrower:
    """Runs a model at the widths of a plan, on its own tensors.

    Args:
        model: The model whose tensors are borrowed; between runs it is whole.
        direct: Add gradients of slices in place. Without it they flow through autograd at full size, which
            ``torch.autograd.grad`` and hooks on parameters need.

    Attributes:
        native: Leave all slicing to autograd, the plain way that benchmarks compare with.
    """

    def __init__(self, model: nn.Module, direct: bool = True) -> None:
        self.model = model
        self.direct = direct
        self.native = False
        self._slots = _slots(model)

    def compile(self, plan: Plan) -> tuple[list[_Loan], list[tuple[nn.Module, str, Mapping[int | None, int]]]]:
        """Prepare what :meth:`lend` swaps in, once per plan."""
        loans = []
        for name, dims in plan.tensors.items():
            slots = self._slots[name]
            loans.append(_Loan(name, slots, spec_of(dims), isinstance(slots[0].table[slots[0].key], nn.Parameter)))
        changes = [(self.model.get_submodule(path), name, v) for (path, name), v in plan.attributes.items()]
        return loans, changes

    @contextmanager
    def lend(
        self, prepared: tuple[list[_Loan], list[tuple[nn.Module, str, Mapping[int | None, int]]]]
    ) -> Iterator[nn.Module]:
        """Hold narrowed tensors and attributes in the model; everything is put back on the way out."""
        loans, changes = prepared
        undo: list[tuple[_Slot, Any]] = []
        back: list[tuple[Tensor, Spec, Tensor]] = []
        attributes: list[tuple[nn.Module, str, Any]] = []
        try:
            for loan in loans:
                whole = loan.slots[0].table[loan.slots[0].key]
                part = self._part(whole, loan)
                if not loan.is_parameter and part._base is None and any(s.module.training for s in loan.slots):
                    back.append((whole, loan.spec, part))
                for slot in loan.slots:
                    undo.append((slot, slot.table[slot.key]))
                    slot.table[slot.key] = part
            for module, name, values in changes:
                attributes.append((module, name, set_attribute(module, name, values)))
            yield self.model
        finally:
            for slot, value in undo:
                slot.table[slot.key] = value
            for module, name, old in reversed(attributes):
                setattr(module, name, old)
            _return_buffers(back)

    @contextmanager
    def replaced(self, new: Callable[[str, nn.Module, Tensor], Tensor]) -> Iterator[None]:
        """Hold other tensors in the model, each named by its first name and with a module that holds it."""
        undo = []
        try:
            for name, slots in self._slots.items():
                old = slots[0].table[slots[0].key]
                made = new(name, slots[0].module, old)
                for slot in slots:
                    undo.append((slot, old))
                    slot.table[slot.key] = made
            yield
        finally:
            for slot, old in undo:
                slot.table[slot.key] = old

    def _part(self, whole: Tensor, loan: _Loan) -> Tensor:
        if not loan.is_parameter:
            return gather(whole, loan.spec)
        if not (whole.requires_grad and torch.is_grad_enabled()):
            return gather(whole.detach(), loan.spec)
        if self.native or whole.numel() < _SMALL:
            return gather(whole, loan.spec)
        return Borrow.apply(whole, loan.spec, self.direct)  # type: ignore[no-any-return, no-untyped-call]


def _return_buffers(back: list[tuple[Tensor, Spec, Tensor]]) -> None:
    """Running statistics that were copied, not viewed, go back where they came from."""
    with torch.no_grad():
        for whole, spec, part in back:
            copy_into(whole, spec, part)


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
