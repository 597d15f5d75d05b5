"""Python integers that remember where they come from.

Models compute sizes in Python: ``B, N, C = x.shape`` and ``x.view(B, N, self.num_heads, C // self.num_heads)``. No
operator sees this arithmetic. During the first run the integer attributes of modules and the entries of ``x.shape``
are therefore :class:`TracedInt`: integers with a *source*. The source names the attribute or the labels that the value
stands for, and survives sums, differences, products, quotients, remainders and shifts. Where such an integer is used as
the size of a labelled dim, a :class:`widthkit.trace.size_uses.SizeUse` is recorded. Where it is compared, the answer is
a :class:`Comparison`: control flow may depend on it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from widthkit.trace.labels import Labels


@dataclass(frozen=True)
class AttributeSource:
    """An integer attribute of a module, or one element of a tuple or list, and its value in the first run."""

    path: str
    name: str
    element: int | None
    value: int = field(default=0, compare=False)


@dataclass(frozen=True, eq=False)
class DimSource:
    """The number of positions that remain of these labels."""

    labels: Labels


@dataclass(frozen=True, eq=False)
class ComputedSource:
    """The result of an operation, one of :data:`ARITHMETIC`."""

    kind: str
    left: Source | int
    right: Source | int


Source = AttributeSource | DimSource | ComputedSource
ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
}
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a comparison of sizes answered in the first run.

    Args:
        kind: One of :data:`COMPARISONS`.
        left: Where the left side comes from.
        right: Where the right side comes from.
        answer: What it answered.
        path: The module that asked.
    """

    kind: str
    left: Source | int
    right: Source | int
    answer: bool
    path: str = ""


@dataclass(frozen=True, eq=False)
class Untraced:
    """A size went where it cannot be followed: into a float, or through ``int``.

    Args:
        source: Where the size comes from.
        path: The module that did it.
    """

    source: Source
    path: str = ""


Watcher = Callable[["Comparison | Untraced"], None]
"""Is told what the model does with a traced integer besides arithmetic that is followed."""


class TracedInt(int):
    """An integer with a source; arithmetic with other integers gives traced integers.

    Args:
        value: The value.
        source: Where it comes from.
        watcher: Is told what happens to the integer.
    """

    source: Source
    watcher: Watcher

    def __new__(cls, value: int, source: Source, watcher: Watcher) -> TracedInt:
        """Make a traced integer."""
        traced = super().__new__(cls, value)
        traced.source = source
        traced.watcher = watcher
        return traced

    def __bool__(self) -> bool:
        """Compare with zero."""
        return bool(self != 0)

    def __neg__(self) -> Any:
        return 0 - self

    def __rshift__(self, bits: Any) -> Any:
        return self // (1 << plain(bits)) if isinstance(bits, int) and bits >= 0 else NotImplemented

    def __lshift__(self, bits: Any) -> Any:
        return self * (1 << plain(bits)) if isinstance(bits, int) and bits >= 0 else NotImplemented

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __hash__(self) -> int:
        return int.__hash__(self)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        """Copy and pickle as a plain integer."""
        return int, (plain(self),)


def source_of(value: Any) -> Source | int:
    """Return the source of a traced integer, or a plain integer itself."""
    return value.source if isinstance(value, TracedInt) else int(value)


def plain(value: int) -> int:
    """Return the value of a traced integer; ``int`` would count as a use by the model."""
    return int.__int__(value)


def _arithmetic(kind: str, swapped: bool) -> Callable[[TracedInt, Any], Any]:
    def combine(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, int) or isinstance(other, bool):
            self.watcher(Untraced(self.source))
            return NotImplemented
        a, b = (other, self) if swapped else (self, other)
        value = ARITHMETIC[kind](plain(a), plain(b))
        return TracedInt(value, ComputedSource(kind, source_of(a), source_of(b)), self.watcher)

    return combine


def _untraced(name: str) -> Callable[..., Any]:
    method = getattr(int, name)

    def leave(self: TracedInt, *args: Any) -> Any:
        self.watcher(Untraced(self.source))
        return method(self, *args)

    return leave


def _comparison(kind: str) -> Callable[[TracedInt, Any], Any]:
    def compare(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, int):
            return COMPARISONS[kind](plain(self), other)
        answer = bool(COMPARISONS[kind](plain(self), plain(other)))
        self.watcher(Comparison(kind, self.source, source_of(other), answer))
        return answer

    return compare


for _kind in ARITHMETIC:
    setattr(TracedInt, f"__{_kind}__", _arithmetic(_kind, False))
    setattr(TracedInt, f"__r{_kind}__", _arithmetic(_kind, True))
for _name in ("truediv", "rtruediv", "pow", "rpow", "int", "float", "trunc", "floor", "ceil", "round"):
    setattr(TracedInt, f"__{_name}__", _untraced(f"__{_name}__"))
for _kind in COMPARISONS:
    setattr(TracedInt, f"__{_kind}__", _comparison(_kind))


_GEOMETRY = {"kernel_size", "stride", "padding", "dilation", "output_padding", "output_size"}
"""Attributes of torch's layers that never count channels."""


def integer_attributes(module: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    """Yield ``(name, element, value)`` of every integer attribute above 1, and of integers in tuples and lists."""
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name in _GEOMETRY:
            continue
        if _may_count(value):
            yield name, None, value
        elif type(value) in (tuple, list):
            for i, item in enumerate(value):
                if _may_count(item):
                    yield name, i, item


def _may_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1


def install_traced_ints(model: nn.Module, watcher: Watcher) -> list[tuple[nn.Module, str, Any]]:
    """Replace the integer attributes of all modules by traced integers.

    Args:
        model: A copy that the tracer may change.
        watcher: Is told what happens to them.

    Returns:
        ``(module, attribute, old value)`` of everything that was replaced.
    """
    replaced = []
    for path, module in model.named_modules():
        table = vars(module)
        for name in {name for name, _, _ in integer_attributes(module)}:
            value = table[name]
            replaced.append((module, name, value))
            if isinstance(value, int):
                table[name] = TracedInt(value, AttributeSource(path, name, None, value), watcher)
            else:
                items = [
                    TracedInt(v, AttributeSource(path, name, i, v), watcher) if _may_count(v) else v
                    for i, v in enumerate(value)
                ]
                table[name] = type(value)(items)
    return replaced
