"""Python integers that remember where they came from.

Sizes leave the world of tensors: ``B, N, C = x.shape`` and ``x.view(B, N, self.num_heads, C // self.num_heads)`` pass
through Python, where no operator sees them. During the first run the integer attributes of modules, and what
``x.shape`` returns, are therefore *numbers*: integers that know the attribute or the labels they stand for, through
sums, products and quotients. Where a number is used as the size of a labelled dim, that is a *claim*: so many
positions must remain there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from widthkit.trace.labels import Labels


@dataclass(frozen=True)
class Attribute:
    """An integer attribute of a module, or one element of a tuple or list."""

    path: str
    name: str
    element: int | None


@dataclass(frozen=True, eq=False)
class Size:
    """The number of positions that are left of these labels."""

    labels: Labels


@dataclass(frozen=True, eq=False)
class Result:
    """What an operation on two sources or plain integers gave."""

    kind: str
    left: Source | int
    right: Source | int


Source = Attribute | Size | Result


class Number(int):
    """An integer with a source; arithmetic with integers keeps it."""

    source: Source

    def __new__(cls, value: int, source: Source) -> Number:
        """Make a number of a value and a source."""
        number = super().__new__(cls, value)
        number.source = source
        return number

    def __hash__(self) -> int:
        return int.__hash__(self)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        """Copies and pickles are plain integers."""
        return int, (int(self),)


def source_of(value: Any) -> Source | int:
    """Return the source of a number, or a plain integer itself."""
    return value.source if isinstance(value, Number) else int(value)


def _arithmetic(kind: str, function: Callable[[int, int], int], swapped: bool) -> Callable[[Number, Any], Any]:
    def combine(self: Number, other: Any) -> Any:
        if not isinstance(other, int) or isinstance(other, bool):
            return NotImplemented
        a, b = (other, self) if swapped else (self, other)
        return Number(function(int(a), int(b)), Result(kind, source_of(a), source_of(b)))

    return combine


for _kind, _function in (
    ("add", operator.add),
    ("sub", operator.sub),
    ("mul", operator.mul),
    ("floordiv", operator.floordiv),
):
    setattr(Number, f"__{_kind}__", _arithmetic(_kind, _function, False))
    setattr(Number, f"__r{_kind}__", _arithmetic(_kind, _function, True))


_GEOMETRY = {"kernel_size", "stride", "padding", "dilation", "output_padding", "output_size"}
"""Attributes of torch's layers that never count channels."""


def integer_attributes(module: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    """Yield ``(name, element, value)`` of every integer attribute above 1, and of integers in tuples and lists."""
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name in _GEOMETRY:
            continue
        if _counts(value):
            yield name, None, value
        elif type(value) in (tuple, list):
            for i, item in enumerate(value):
                if _counts(item):
                    yield name, i, item


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1


def install(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Turn the integer attributes of all modules into numbers; return ``(module, name, old value)`` for each.

    The model is a copy that belongs to the trace.
    """
    old = []
    for path, module in model.named_modules():
        table = vars(module)
        for name in {name for name, _, _ in integer_attributes(module)}:
            value = table[name]
            old.append((module, name, value))
            if isinstance(value, int):
                table[name] = Number(value, Attribute(path, name, None))
            else:
                items = [Number(v, Attribute(path, name, i)) if _counts(v) else v for i, v in enumerate(value)]
                table[name] = type(value)(items)
    return old
