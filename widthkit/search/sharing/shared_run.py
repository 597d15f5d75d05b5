"""One run of a sub-network that computes what no earlier sub-network has."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from widthkit.search.sharing.memo import Held, Memo, Operation, Origin, Unsafe, storage
from widthkit.search.sharing.stand_in import Aliases, StandIn
from widthkit.search.sharing.tree import leaves, replace

Key = tuple[Any, ...]
_PLAIN = (int, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_BATCH_NORM = torch.ops.aten.batch_norm.default


class SharedRun:
    """One sub-network on one batch: computes what no earlier one has, and keeps what later ones need.

    Args:
        memo: What is known of the batch.
        who: The sub-network's place in the list.
        write: Answers operators that write to a tensor (:func:`widthkit.search.sharing.writes.write`).
    """

    def __init__(self, memo: Memo, who: int, write: Callable[..., Any]) -> None:
        self.memo = memo
        self._write = write
        self.later = memo.all & ~((1 << (who + 1)) - 1)
        self._who = who
        self._made: list[weakref.ref[StandIn]] = []
        self._leaves: list[Held] = []
        self._leaf_memory: set[int] = set()
        self._fresh: list[Held] = []
        self._own = Aliases()

    def leaf(self, name: str, value: Tensor, role: str = "leaf") -> StandIn:
        """Return the stand-in of an input or of a tensor of the model."""
        previous = self.memo.held.get(name)
        if previous is not None and previous[0] is value:
            stand_in: StandIn = previous[1]
            stand_in.run, stand_in.aliases = self, self._own
            assert stand_in.held is not None
            self._leaves.append(stand_in.held)
            return stand_in
        whole = value
        if type(value) is not Tensor:
            value = value.detach()
        origin = self.memo.leaf(name, self._who, value, role)
        self._leaves.append(origin.put(value))
        stand_in = StandIn(self, origin, self._leaves[-1], self._own)
        if self.memo.is_whole_for_all(name):
            self.memo.held[name] = whole, stand_in
        return stand_in

    def finish(self) -> None:
        """End the run: stand-ins that the model put aside get their values, which they keep."""
        for reference in self._made:
            left = reference()
            if left is not None:
                left.value()
                left.origin = None

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Answer one operator call."""
        given: list[Any] = []
        # What a batch norm returns in training mode does not depend on its momentum, which may count batches.
        updates = func is _BATCH_NORM and len(args) > 6 and bool(args[5])
        key: list[Any] = [func]
        named = self._name(args[:6] if updates else args, given, key)
        if updates:
            named &= self._name(args[7:], given, key)
        for name, value in sorted(kwargs.items()):
            key.append(name)
            named &= self._name((value,), given, key)
        if any(t.origin.role == "statistics" for t in given if type(t) is StandIn and t.origin is not None):
            _check_statistics(given, args if updates else ())
        if func._schema.is_mutable:
            return self._write(self, func, args, kwargs, given, tuple(key) if named else None)
        operation = self._find(func, args, kwargs, given, tuple(key)) if named and given else None
        return self.run_alone(func, args, kwargs, given) if operation is None else self._stand_ins(operation, given)

    def run_alone(self, func: Any, args: Any, kwargs: Any, given: Sequence[Tensor]) -> Any:
        """Run an operator whose result belongs to this sub-network alone."""
        values = [self.read(t) for t in given]
        rest = iter(values)
        args, kwargs = replace((args, kwargs), Tensor, lambda _: next(rest))
        out = func(*args, **kwargs)
        aliases = {storage(v): t.aliases for v, t in zip(values, given, strict=True) if isinstance(t, StandIn)}
        aliases.pop(0, None)

        def private(value: Tensor) -> Tensor:
            for v, t in zip(values, given, strict=True):
                if value is v:
                    return t
            own = aliases.get(storage(value)) if value.layout is torch.strided else None
            return value if own is None else self._stand_in(None, Held(value), own)

        return replace(out, Tensor, private)

    def read(self, tensor: Tensor) -> Tensor:
        """Return the value that an operator of this sub-network alone reads, and keep it if later ones need it."""
        if not isinstance(tensor, StandIn):
            return tensor
        value = tensor.value()
        if tensor.origin is not None and tensor.origin.role == "value" and tensor.origin.sharers & self.later:
            assert tensor.held is not None
            self.memo.want(tensor.origin, tensor.held)
        return value

    def is_read_only(self, memory: int) -> bool:
        """Whether a piece of memory belongs to the model or to its input."""
        if not self._leaf_memory:
            self._leaf_memory = {storage(leaf.value) for leaf in self._leaves}
        return memory in self._leaf_memory

    def is_needed_elsewhere(self, memory: int, besides: StandIn) -> bool:
        """Whether the memo, or a stand-in other than ``besides``, holds a value in a piece of memory."""
        held = [*self.memo.kept.values(), *self.memo.wanted.values()]
        alive = [t for t in (reference() for reference in self._made) if t is not None and t is not besides]
        held += [t.held for t in alive if t.held is not None]
        return any(storage(h.value) == memory for h in held)

    def _name(self, arguments: Any, given: list[Any], key: list[Any]) -> bool:
        """Collect tensors, and what names the arguments in a key; ``False`` where something has no name.

        Equal names mean equal arguments, to the last bit and type.
        """
        named = True
        for argument in arguments:
            kind = type(argument)
            if kind is StandIn:
                given.append(argument)
                if argument.origin is None or argument.run is not self:
                    named = False
                else:
                    key.append(argument.origin)
            elif kind in _PLAIN:
                key += [kind, argument]
            elif kind is float:
                key.append(argument.hex())
            elif kind is list or kind is tuple:
                key.append(len(argument))
                named &= self._name(argument, given, key)
            else:
                given += leaves(argument, Tensor)
                named = False
        return named

    def _find(self, func: Any, args: Any, kwargs: Any, given: Sequence[StandIn], key: Key) -> Operation | None:
        """Find an operator's result, or compute it if a later sub-network needs it; ``None`` if it is not shared."""
        if key not in self.memo.operations:
            sharers = common_sharers(given, self.memo.all)
            if not sharers & self.later:
                return None
            operation = as_operation(func, args, kwargs)
            if not self._compute(operation, given, sharers):
                return None
            self.memo.operations[key] = operation
        return self.memo.operations[key]

    def _compute(self, operation: Operation, own: Sequence[StandIn], sharers: int) -> bool:
        """Run an operator and note what it returns; ``False`` if its result cannot be shared."""
        if torch.Tag.nondeterministic_seeded in operation.func.tags:
            return False  # It may draw random numbers; every sub-network draws its own, in the same order.
        values = [t.value() for t in own]
        rest = iter(values)
        args, kwargs = replace((operation.args, operation.kwargs), Origin, lambda _: next(rest))
        out = operation.func(*args, **kwargs)
        made = leaves(out, Tensor)
        if any(type(t) is not Tensor or t.layout is not torch.strided for t in made):
            return False
        memory = [storage(v) for v in values]
        operation.aliases = tuple(_index(memory, storage(t)) for t in made)
        operation.same = tuple(a is not None and t is values[a] for t, a in zip(made, operation.aliases, strict=True))
        self._fresh = [Held(t) for t in made]  # alive until the stand-ins hold them
        rest_held = iter(self._fresh)

        def origin(value: Tensor) -> Origin:
            new = self.memo.origin(sharers, value, operation)
            new.held = weakref.ref(next(rest_held))
            return new

        operation.outs = replace(out, Tensor, origin)
        return True

    def _stand_ins(self, operation: Operation, own: Sequence[StandIn]) -> Any:
        places = iter(zip(operation.aliases, operation.same, strict=True))

        def stand_in(origin: Origin) -> StandIn:
            alias, same = next(places)
            if same and alias is not None:
                return own[alias]
            return self._stand_in(origin, origin.held(), own[alias].aliases if alias is not None else Aliases())

        answer = replace(operation.outs, Origin, stand_in)
        self._fresh = []
        return answer

    def _stand_in(self, origin: Origin | None, held: Held | None, aliases: Aliases) -> StandIn:
        made = StandIn(self, origin, held, aliases)
        aliases.join(made)
        self._made.append(weakref.ref(made))
        return made


def common_sharers(tensors: Sequence[Any], everyone: int) -> int:
    """Return the bit set of the sub-networks that have all these tensors."""
    for tensor in tensors:
        everyone &= tensor.origin.sharers
    return everyone


def as_operation(func: Any, args: Any, kwargs: Any) -> Operation:
    """Write an operator call down with origins in place of stand-ins."""
    return Operation(func, *replace((args, kwargs), StandIn, lambda t: t.origin))


def _index(memory: Sequence[int], wanted: int) -> int | None:
    return memory.index(wanted) if wanted and wanted in memory else None


def _check_statistics(given: Sequence[Any], update: Any) -> None:
    """Refuse any use of running statistics but their update, on which the network's outputs do not depend."""
    for tensor in given:
        if type(tensor) is StandIn and tensor.origin is not None and tensor.origin.role == "statistics":
            if update and (tensor is update[3] or tensor is update[4]):
                continue
            raise Unsafe("running statistics of a batch norm are used by something else")
