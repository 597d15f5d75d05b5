"""Values by where they come from: what a memo of operator calls knows, and what it keeps.

Several sub-networks run on the same batch. A value is known by its *lineage*: a leaf (an input, or a slice of a
parameter), or an operator with its arguments' lineages. Two sub-networks that reach the same lineage hold the same
value, so the second need not compute it. Lineages are remembered without their values; values live as long as a
running sub-network or the memo holds their :class:`Box`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

_ATOMS = (int, float, bool, str, type(None))
Meta = tuple[Any, ...]


class Unsafe(Exception):
    """A model does something that sharing would change; it must run plainly."""


class Box:
    """Holds one value; whoever holds the box keeps the value alive."""

    __slots__ = ("__weakref__", "value")

    def __init__(self, value: Tensor) -> None:
        self.value = value


@dataclass(eq=False)
class Node:
    """One value's lineage.

    Args:
        sharers: Bit set of the sub-networks that have this value.
        meta: Shape, strides, offset, dtype and device.
        call: What computes it; ``None`` for a leaf.
        role: Why it is there: ``value``, ``leaf``, or ``statistics`` (running statistics of a batch norm).
    """

    sharers: int
    meta: Meta
    call: Call | None = None
    role: str = "value"
    box: Callable[[], Box | None] = field(default=lambda: None, repr=False)

    def put(self, value: Tensor) -> Box:
        """Remember a value as long as its box lives."""
        box = Box(value)
        self.box = weakref.ref(box)
        return box


@dataclass(eq=False)
class Call:
    """One operator call whose arguments are all known.

    Args:
        func: The operator.
        args: Positional arguments with nodes in place of tensors.
        kwargs: Keyword arguments, likewise.
        outs: What it returns, with nodes in place of tensors.
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


def replace(tree: Any, kind: type | tuple[type, ...], new: Callable[[Any], Any]) -> Any:
    """Rebuild nested lists, tuples and dicts with every leaf of a kind replaced, in order."""
    if type(tree) in _ATOMS:
        return tree
    if isinstance(tree, kind):
        return new(tree)
    if isinstance(tree, list):
        return [replace(item, kind, new) for item in tree]
    if isinstance(tree, tuple):
        items = [replace(item, kind, new) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, dict):
        return {name: replace(item, kind, new) for name, item in tree.items()}
    return tree


def leaves(tree: Any, kind: type) -> list[Any]:
    """List the leaves of a kind in nested lists, tuples and dicts, in order."""
    found: list[Any] = []
    replace(tree, kind, found.append)
    return found


def meta_of(value: Tensor) -> Meta:
    """Return shape, strides, offset, dtype and device."""
    return value.size(), value.stride(), value.storage_offset(), value.dtype, value.device


def storage(tensor: Tensor) -> int:
    """Name the memory a tensor lies in; 0 for an empty one, which shares nothing."""
    memory = tensor.untyped_storage()
    return int(memory._cdata) if memory.nbytes() else 0


class Memo:
    """What all sub-networks of a list know of one batch on one path.

    Args:
        sharers: Tensor name -> per sub-network the bit set of those that use the same slice of it; a tensor that is not
            named is the same for all.
        n: How many sub-networks there are.

    Attributes:
        kept: Values from the last sub-network's run.
        wanted: Values from the running one's that the next will need.
        room: Bytes that both may take.
        crowded: Whether something had to be left out.
        held: Name of a tensor that nobody narrows -> the tensor, and what the last sub-network saw in its place.
    """

    def __init__(self, sharers: Mapping[str, list[int]], n: int) -> None:
        self.all = (1 << n) - 1
        self.calls: dict[Hashable, Call] = {}
        self.kept: dict[Node, Box] = {}
        self.wanted: dict[Node, Box] = {}
        self.room = 1 << 62
        self.crowded = False
        self._sizes: dict[int, int] = {}
        self._sharers = sharers
        self._leaves: dict[Hashable, Node] = {}
        self.held: dict[str, Any] = {}

    def leaf(self, name: str, who: int, value: Tensor, role: str) -> Node:
        """Return the node of an input or of a sub-network's slice of a tensor."""
        sharers = self._sharers[name][who] if name in self._sharers else self.all
        key = name, sharers
        if key not in self._leaves:
            self._leaves[key] = self.node(sharers, value, role=role)
        return self._leaves[key]

    def everyone_has(self, name: str) -> bool:
        """Whether all sub-networks use a tensor whole, so that it is the model's own and no slice."""
        return name not in self._sharers

    def node(self, sharers: int, value: Tensor, call: Call | None = None, role: str = "value") -> Node:
        """Make a node for a value."""
        return Node(sharers, meta_of(value), call, role)

    def want(self, node: Node, box: Box) -> None:
        """Keep a value for the next sub-network; the largest are given up where there is no room."""
        if node in self.wanted:
            return
        self.wanted[node] = box
        self._sizes[storage(box.value)] = box.value.untyped_storage().nbytes()
        while sum(self._sizes.values()) > self.room:
            self.crowded = True
            largest = max(self._sizes, key=lambda memory: self._sizes[memory])
            del self._sizes[largest]
            for kept in (self.wanted, self.kept):
                for other in [n for n, b in kept.items() if storage(b.value) == largest]:
                    del kept[other]

    def turn(self) -> None:
        """End a sub-network's run: what it wanted is kept, what was kept for it goes."""
        self.kept, self.wanted = self.wanted, {}
        self._sizes = {storage(b.value): b.value.untyped_storage().nbytes() for b in self.kept.values()}

    @property
    def bytes(self) -> int:
        """Memory of what is kept."""
        return sum(self._sizes.values())


def recompute(node: Node) -> Box:
    """Return a node's value; calls whose values are gone run again, each once, on bit-identical inputs.

    Raises:
        Unsafe: If a leaf is gone, which no running sub-network lets happen.
    """
    found = node.box()
    if found is not None:
        return found
    order, uses, held = _missing(node)
    for call in order:
        inputs = leaves((call.args, call.kwargs), Node)
        _run_again(call, held, uses, node)
        for used in inputs:
            uses[used] -= 1
            if not uses[used]:
                held.pop(used, None)
    return held[node]


def _missing(node: Node) -> tuple[list[Call], dict[Node, int], dict[Node, Box]]:
    """List the calls to repeat in order, how often their inputs are used, and the values that are still there."""
    order: dict[Call, None] = {}
    uses: dict[Node, int] = {node: 1}
    held: dict[Node, Box] = {}
    entered: set[Call] = set()
    stack: list[Any] = [node]
    while stack:
        item = stack.pop()
        if isinstance(item, Call):
            order[item] = None
            continue
        box = item.box()
        if box is not None:
            held[item] = box
            continue
        if item.call is None:
            raise Unsafe("a leaf's value is gone")
        if item.call not in entered:
            entered.add(item.call)
            inputs = leaves((item.call.args, item.call.kwargs), Node)
            for used in inputs:
                uses[used] = uses.get(used, 0) + 1
            stack += [item.call, *inputs]
    return list(order), uses, held


def _run_again(call: Call, held: dict[Node, Box], uses: Mapping[Node, int], goal: Node) -> None:
    values = [held[n].value for n in leaves((call.args, call.kwargs), Node)]
    if call.target is not None:
        values[call.target] = values[call.target].clone()
    rest = iter(values)
    args, kwargs = replace((call.args, call.kwargs), Node, lambda _: next(rest))
    out = call.func(*args, **kwargs)
    for made, value in zip(leaves(call.outs, Node), leaves(out, Tensor), strict=True):
        if made is goal or uses.get(made):
            held[made] = made.put(value)
