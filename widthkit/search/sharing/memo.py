"""What the sub-networks of a list have computed on one batch, and which of it is kept.

Several sub-networks run on the same batch. Every value has an *origin*: a leaf (an input, or a slice of a parameter),
or an operator with the origins of its arguments. Two sub-networks that reach the same origin hold the same value, so
the second need not compute it. Origins are remembered without their values. A value lives as long as a running
sub-network or the memo holds its :class:`Held`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from widthkit.search.sharing.tree import leaves, replace

Meta = tuple[Any, ...]


class Unsafe(Exception):
    """A model does something whose result sharing would change; it is judged without sharing."""


class Held:
    """Keeps one value alive."""

    __slots__ = ("__weakref__", "value")

    def __init__(self, value: Tensor) -> None:
        self.value = value


@dataclass(eq=False)
class Origin:
    """Where one value comes from.

    Args:
        sharers: Bit set of the sub-networks that have this value.
        meta: Shape, strides, offset, dtype and device.
        operation: What computes it; ``None`` for a leaf.
        role: ``value``, ``leaf``, or ``statistics`` (running statistics of a batch norm).
        held: Returns the value while somebody holds it, else ``None``.
    """

    sharers: int
    meta: Meta
    operation: Operation | None = None
    role: str = "value"
    held: Callable[[], Held | None] = field(default=lambda: None, repr=False)

    def put(self, value: Tensor) -> Held:
        """Remember a value weakly; return what keeps it alive."""
        held = Held(value)
        self.held = weakref.ref(held)
        return held


@dataclass(eq=False)
class Operation:
    """One call of an operator whose arguments all have an origin.

    Args:
        func: The operator.
        args: Positional arguments with origins in place of tensors.
        kwargs: Keyword arguments, likewise.
        outs: What it returns, with origins in place of tensors.
        aliases: Per tensor of ``outs``, which tensor argument it shares memory with, if any.
        same: Per tensor of ``outs``, whether it *is* that argument.
        target: Which tensor argument it writes to, if any.
    """

    func: Any
    args: Any
    kwargs: Any
    outs: Any = None
    aliases: tuple[int | None, ...] = ()
    same: tuple[bool, ...] = ()
    target: int | None = None


def meta_of(value: Tensor) -> Meta:
    """Return shape, strides, offset, dtype and device."""
    return value.size(), value.stride(), value.storage_offset(), value.dtype, value.device


def storage(tensor: Tensor) -> int:
    """Return a number for the memory that a tensor lies in; 0 for an empty tensor, which shares nothing."""
    memory = tensor.untyped_storage()
    return int(memory._cdata) if memory.nbytes() else 0


class Memo:
    """What all sub-networks of a list have computed on one batch and path.

    Args:
        sharers: Tensor name -> per sub-network the bit set of those that use the same slice of it. A tensor that is not
            named is the same for all.
        n: How many sub-networks there are.

    Attributes:
        operations: Name of an operator call -> what it returned.
        kept: Values from the previous sub-network's run.
        wanted: Values of the running one that later ones need.
        room: Most bytes that both may take.
        crowded: Whether a value was given up for lack of room.
        held: Name of a tensor that no sub-network narrows -> the tensor, and its stand-in in the previous run.
    """

    def __init__(self, sharers: Mapping[str, list[int]], n: int) -> None:
        self.all = (1 << n) - 1
        self.operations: dict[Hashable, Operation] = {}
        self.kept: dict[Origin, Held] = {}
        self.wanted: dict[Origin, Held] = {}
        self.room = 1 << 62
        self.crowded = False
        self._sizes: dict[int, int] = {}
        self._sharers = sharers
        self._leaves: dict[Hashable, Origin] = {}
        self.held: dict[str, Any] = {}

    def leaf(self, name: str, who: int, value: Tensor, role: str) -> Origin:
        """Return the origin of an input or of a sub-network's slice of a tensor."""
        sharers = self._sharers[name][who] if name in self._sharers else self.all
        key = name, sharers
        if key not in self._leaves:
            self._leaves[key] = self.origin(sharers, value, role=role)
        return self._leaves[key]

    def is_whole_for_all(self, name: str) -> bool:
        """Whether no sub-network narrows the tensor."""
        return name not in self._sharers

    def origin(self, sharers: int, value: Tensor, operation: Operation | None = None, role: str = "value") -> Origin:
        """Make an origin for a value."""
        return Origin(sharers, meta_of(value), operation, role)

    def want(self, origin: Origin, held: Held) -> None:
        """Keep a value for later sub-networks; the largest values are given up where there is no room."""
        if origin in self.wanted:
            return
        self.wanted[origin] = held
        self._sizes[storage(held.value)] = held.value.untyped_storage().nbytes()
        while sum(self._sizes.values()) > self.room:
            self.crowded = True
            largest = max(self._sizes, key=lambda memory: self._sizes[memory])
            del self._sizes[largest]
            for values in (self.wanted, self.kept):
                for other in [o for o, h in values.items() if storage(h.value) == largest]:
                    del values[other]

    def end_run(self) -> None:
        """Keep what the sub-network wanted; drop what was kept for it."""
        self.kept, self.wanted = self.wanted, {}
        self._sizes = {storage(h.value): h.value.untyped_storage().nbytes() for h in self.kept.values()}

    def clear(self) -> None:
        """Drop everything that refers to a run."""
        self.held.clear()
        self.kept, self.wanted, self._sizes = {}, {}, {}

    @property
    def bytes(self) -> int:
        """Bytes of what is kept."""
        return sum(self._sizes.values())


def recompute(origin: Origin) -> Held:
    """Return the value of an origin; operators whose values were dropped run again, each once, on the same inputs.

    Raises:
        Unsafe: If the value of a leaf was dropped.
    """
    found = origin.held()
    if found is not None:
        return found
    order, uses, values = _missing(origin)
    for operation in order:
        inputs = leaves((operation.args, operation.kwargs), Origin)
        _run_again(operation, values, uses, origin)
        for used in inputs:
            uses[used] -= 1
            if not uses[used]:
                values.pop(used, None)
    return values[origin]


def _missing(origin: Origin) -> tuple[list[Operation], dict[Origin, int], dict[Origin, Held]]:
    """List the operators to repeat in order, how often their inputs are used, and the values that are still there."""
    order: dict[Operation, None] = {}
    uses: dict[Origin, int] = {origin: 1}
    values: dict[Origin, Held] = {}
    entered: set[Operation] = set()
    stack: list[Any] = [origin]
    while stack:
        item = stack.pop()
        if isinstance(item, Operation):
            order[item] = None
            continue
        held = item.held()
        if held is not None:
            values[item] = held
            continue
        if item.operation is None:
            raise Unsafe("the value of an input or a parameter was dropped")
        if item.operation not in entered:
            entered.add(item.operation)
            inputs = leaves((item.operation.args, item.operation.kwargs), Origin)
            for used in inputs:
                uses[used] = uses.get(used, 0) + 1
            stack += [item.operation, *inputs]
    return list(order), uses, values


def _run_again(operation: Operation, values: dict[Origin, Held], uses: Mapping[Origin, int], goal: Origin) -> None:
    inputs = [values[o].value for o in leaves((operation.args, operation.kwargs), Origin)]
    if operation.target is not None:
        inputs[operation.target] = inputs[operation.target].clone()
    rest = iter(inputs)
    args, kwargs = replace((operation.args, operation.kwargs), Origin, lambda _: next(rest))
    out = operation.func(*args, **kwargs)
    for made, value in zip(leaves(operation.outs, Origin), leaves(out, Tensor), strict=True):
        if made is goal or uses.get(made):
            values[made] = made.put(value)
