"""Tensors that know their lineage, and one run of a sub-network on them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from widthkit.search.lineage import (
    Box,
    Call,
    Memo,
    Node,
    Unsafe,
    leaves,
    meta_of,
    recompute,
    replace,
    storage,
)

Key = tuple[Any, ...]
_NAMED = (int, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_BATCH_NORM = torch.ops.aten.batch_norm.default


class Family:
    """The living tensors of one run that share memory as far as the model can tell."""

    def __init__(self) -> None:
        self._members: list[weakref.ref[Known]] = []

    def join(self, member: Known) -> None:
        """Add a tensor."""
        self._members.append(weakref.ref(member))

    def others(self, member: Known) -> bool:
        """Whether any other tensor of the family is still in use."""
        return any(m() is not None and m() is not member for m in self._members)


class Known(Tensor):
    """Looks like a tensor to the model; its value may be there, or may only be known by its lineage.

    Attributes:
        run: The run that it belongs to.
        node: Its lineage; ``None`` where it belongs to this sub-network alone.
        box: Its value, if it is there.
        family: What shares its memory.
    """

    run: Run
    node: Node | None
    box: Box | None
    family: Family

    @staticmethod
    def __new__(cls: type[Known], run: Run, node: Node | None, box: Box | None, family: Family) -> Known:
        """Make a tensor without memory of its own."""
        if node is None:
            assert box is not None
            size, stride, offset, dtype, device = meta_of(box.value)
        else:
            size, stride, offset, dtype, device = node.meta
        made: Known = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, size, strides=stride, storage_offset=offset, dtype=dtype, device=device
        )
        made.run, made.node, made.box, made.family = run, node, box, family
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Let the run decide whether the operator must be computed."""
        for argument in args:
            if type(argument) is Known:
                return argument.run.dispatch(func, args, kwargs or {})
        known = leaves((args, kwargs or {}), Known)[0]
        return known.run.dispatch(func, args, kwargs or {})

    def value(self) -> Tensor:
        """Return the value, computed again if it is gone."""
        if self.box is None:
            assert self.node is not None
            self.box = recompute(self.node)
        return self.box.value


class Run:
    """One sub-network on one batch: computes what no earlier sub-network has, and notes what later ones will need.

    Args:
        memo: What is known of the batch.
        who: The sub-network's place in the list.
    """

    def __init__(self, memo: Memo, who: int) -> None:
        self.memo = memo
        self.later = memo.all & ~((1 << (who + 1)) - 1)
        self._who = who
        self._made: list[weakref.ref[Known]] = []
        self._leaves: list[Box] = []
        self._fresh: list[Box] = []
        self._own = Family()
        self._memory: set[int] = set()

    def leaf(self, name: str, value: Tensor, role: str = "leaf") -> Known:
        """Make an input, or a tensor of the model, known."""
        leaf = self.memo.held.get(name)
        if leaf is not None and leaf[0] is value:
            # The same tensor as for the last sub-network.
            known: Known = leaf[1]
            known.run, known.family = self, self._own
            assert known.box is not None
            self._leaves.append(known.box)
            return known
        whole = value
        if type(value) is not Tensor:
            value = value.detach()
        node = self.memo.leaf(name, self._who, value, role)
        self._leaves.append(node.put(value))
        known = Known(self, node, self._leaves[-1], self._own)
        if self.memo.everyone_has(name):
            self.memo.held[name] = whole, known
        return known

    def settle(self) -> None:
        """End the run: tensors that the model put aside get their values, which they keep."""
        for reference in self._made:
            left = reference()
            if left is not None:
                left.value()
                left.node = None

    def dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Answer one operator call."""
        given: list[Any] = []
        # What a batch norm returns in training mode does not depend on its momentum, which may count batches.
        updates = func is _BATCH_NORM and len(args) > 6 and bool(args[5])
        key: list[Any] = [func]
        named = self._name(args[:6] if updates else args, given, key)
        if updates:
            named &= self._name(args[7:], given, key)
        if kwargs:
            for name, value in sorted(kwargs.items()):
                key.append(name)
                named &= self._name((value,), given, key)
        if any(t.node.role == "statistics" for t in given if type(t) is Known and t.node is not None):
            _check_statistics(given, args if updates else ())
        if func._schema.is_mutable:
            return self._write(func, args, kwargs, given, tuple(key) if named else None)
        call = self._recall(func, args, kwargs, given, tuple(key)) if named and given else None
        return self._plain(func, args, kwargs, given) if call is None else self._answer(call, given)

    def _name(self, arguments: Any, given: list[Any], key: list[Any]) -> bool:
        """Collect tensors, and what names the arguments in a key; ``False`` where something has no name.

        Equal names mean equal arguments, to the last bit and type.
        """
        named = True
        for argument in arguments:
            kind = type(argument)
            if kind is Known:
                given.append(argument)
                node = argument.node
                if node is None or argument.run is not self:
                    named = False
                else:
                    key.append(node)
            elif kind in _NAMED:
                key.append(kind)
                key.append(argument)
            elif kind is float:
                key.append(argument.hex())
            elif kind is list or kind is tuple:
                key.append(len(argument))
                named &= self._name(argument, given, key)
            else:
                given += leaves(argument, Tensor)
                named = False
        return named

    # --- operators that only read -------------------------------------------------------------------------------------

    def _recall(self, func: Any, args: Any, kwargs: Any, given: Sequence[Known], key: Key) -> Call | None:
        """Find the call, or compute it if a later sub-network will ask for it; ``None`` if it must run plainly."""
        if key not in self.memo.calls:
            sharers = _sharers(given, self.memo.all)
            if not sharers & self.later:
                return None
            call = _call(func, args, kwargs)
            if not self._compute(call, given, sharers):
                return None
            self.memo.calls[key] = call
        return self.memo.calls[key]

    def _compute(self, call: Call, own: Sequence[Known], sharers: int) -> bool:
        """Run a call and fill in what it returns; ``False`` if its result cannot be shared."""
        values = [t.value() for t in own]
        before = _generator_state(call.func, values)
        rest = iter(values)
        args, kwargs = replace((call.args, call.kwargs), Node, lambda _: next(rest))
        out = call.func(*args, **kwargs)
        if before is not None and not torch.equal(before, _generator_state(call.func, values)):  # type: ignore[arg-type]
            _restore_generator(values, before)
            return False
        made = leaves(out, Tensor)
        if any(type(t) is not Tensor or t.layout is not torch.strided for t in made):
            return False
        memory = [storage(v) for v in values]
        call.aliases = tuple(_index(memory, storage(t)) for t in made)
        call.same = tuple(a is not None and t is values[a] for t, a in zip(made, call.aliases, strict=True))
        self._fresh = [Box(t) for t in made]  # alive until the answer holds them
        rest_boxes = iter(self._fresh)

        def node(value: Tensor) -> Node:
            new = self.memo.node(sharers, value, call)
            new.box = weakref.ref(next(rest_boxes))
            return new

        call.outs = replace(out, Tensor, node)
        return True

    def _answer(self, call: Call, own: Sequence[Known]) -> Any:
        places = iter(zip(call.aliases, call.same, strict=True))

        def known(node: Node) -> Known:
            alias, same = next(places)
            if same and alias is not None:
                return own[alias]
            return self._known(node, node.box(), own[alias].family if alias is not None else Family())

        answer = replace(call.outs, Node, known)
        self._fresh = []
        return answer

    def _plain(self, func: Any, args: Any, kwargs: Any, given: Sequence[Tensor]) -> Any:
        """Run an operator that belongs to this sub-network alone."""
        values = [self._read(t) for t in given]
        rest = iter(values)
        args, kwargs = replace((args, kwargs), Tensor, lambda _: next(rest))
        out = func(*args, **kwargs)
        families = {storage(v): t.family for v, t in zip(values, given, strict=True) if isinstance(t, Known)}
        families.pop(0, None)

        def private(value: Tensor) -> Tensor:
            for v, t in zip(values, given, strict=True):
                if value is v:
                    return t
            family = families.get(storage(value)) if value.layout is torch.strided else None
            return value if family is None else self._known(None, Box(value), family)

        return replace(out, Tensor, private)

    def _read(self, tensor: Tensor) -> Tensor:
        """Return the value that an operator outside the shared part reads, and note that it is needed there."""
        if not isinstance(tensor, Known):
            return tensor
        value = tensor.value()
        if tensor.node is not None and tensor.node.role == "value" and tensor.node.sharers & self.later:
            assert tensor.box is not None
            self.memo.want(tensor.node, tensor.box)
        return value

    # --- operators that write -----------------------------------------------------------------------------------------

    def _write(self, func: Any, args: Any, kwargs: Any, given: Sequence[Tensor], key: Key | None) -> Any:
        """Run an operator that writes; a known tensor then stands for the new value, and the old one stays intact."""
        written = [t for t in _written(func, args, kwargs) if isinstance(t, Known)]
        if not written:
            return self._plain(func, args, kwargs, given)
        target = written[0]
        place = next(i for i, t in enumerate(given) if t is target)
        if len(written) > 1 or len([t for t in given if t is target]) > 1:
            raise Unsafe(f"{func} writes to several tensors at once")
        if target.node is not None and target.node.role == "leaf":
            raise Unsafe(f"{func} writes to the model's own tensors or to its input")
        if target.family.others(target):
            raise Unsafe(f"{func} writes to a tensor that others are views of")
        if key is not None and self._write_known(func, args, kwargs, given, place, key):
            return target
        value = self._exclusive(target)
        self._run_write(func, args, kwargs, [value if t is target else self._read(t) for t in given], value)
        target.node, target.box = None, Box(value)
        return target

    def _write_known(self, func: Any, args: Any, kwargs: Any, given: Sequence[Any], place: int, key: Key) -> bool:
        """Let a known tensor stand for what a call writes to it; ``False`` if the call must run plainly."""
        target = given[place]
        if key in self.memo.calls:
            target.node = self.memo.calls[key].outs
            target.box = target.node.box()
            return True
        sharers = _sharers(given, self.memo.all)
        if not sharers & self.later or torch.Tag.nondeterministic_seeded in func.tags:
            return False
        call = _call(func, args, kwargs)
        value = self._exclusive(target)
        self._run_write(func, args, kwargs, [value if t is target else t.value() for t in given], value)
        call.target, call.outs = place, self.memo.node(sharers, value, call)
        self.memo.calls[key] = call
        target.node, target.box = call.outs, call.outs.put(value)
        return True

    @staticmethod
    def _run_write(func: Any, args: Any, kwargs: Any, values: Sequence[Tensor], target: Tensor) -> None:
        rest = iter(values)
        args, kwargs = replace((args, kwargs), Tensor, lambda _: next(rest))
        meta = target.size(), target.stride(), target.dtype
        out = func(*args, **kwargs)
        if out is not target or meta != (target.size(), target.stride(), target.dtype):
            raise Unsafe(f"{func} does not return what it writes to, or changes its shape")

    def _exclusive(self, target: Known) -> Tensor:
        """Return a tensor's value for writing: itself if nobody else needs it, else a copy."""
        value = target.value()
        memory = storage(value)
        if not self._memory:
            self._memory = {storage(leaf.value) for leaf in self._leaves}
        if memory in self._memory:
            raise Unsafe("a view of the model's own tensors or of its input is written to")
        boxes = [*self.memo.kept.values(), *self.memo.wanted.values()]
        boxes += [t.box for t in (r() for r in self._made) if t is not None and t is not target and t.box is not None]
        if any(storage(b.value) == memory for b in boxes):
            return value.clone()
        if target.node is not None:
            target.node.box = _gone
        return value

    def _known(self, node: Node | None, box: Box | None, family: Family) -> Known:
        made = Known(self, node, box, family)
        family.join(made)
        self._made.append(weakref.ref(made))
        return made


def _gone() -> None:
    """Stand for the box of a value that was written over."""


def _sharers(tensors: Sequence[Any], everyone: int) -> int:
    """Return the bit set of the sub-networks that have all these tensors."""
    for tensor in tensors:
        everyone &= tensor.node.sharers
    return everyone


def _index(memory: Sequence[int], wanted: int) -> int | None:
    return memory.index(wanted) if wanted and wanted in memory else None


@cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    arguments = func._schema.arguments
    return tuple((i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """List the tensors that an operator writes to."""
    found = [args[i] if i < len(args) else kwargs.get(name) for i, name in _written_arguments(func)]
    return leaves(found, Tensor)


def _call(func: Any, args: Any, kwargs: Any) -> Call:
    return Call(func, *replace((args, kwargs), Known, lambda t: t.node))


def _check_statistics(given: Sequence[Any], update: Any) -> None:
    """Refuse any use of running statistics but their update, which does nothing to the network's outputs."""
    for tensor in given:
        if type(tensor) is Known and tensor.node is not None and tensor.node.role == "statistics":
            if update and (tensor is update[3] or tensor is update[4]):
                continue
            raise Unsafe("running statistics of a batch norm are used by something else")


def _generator_state(func: Any, values: Sequence[Tensor]) -> Tensor | None:
    """Return the state of the generator that a random operator may draw from; ``None`` for other operators."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return None
    device = values[0].device
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _restore_generator(values: Sequence[Tensor], state: Tensor) -> None:
    device = values[0].device
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
