"""Find every tensor that can be reached from what a model returns, whatever it is wrapped in."""

from __future__ import annotations

import enum
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, range, slice, type, nn.Module)
_PLAIN_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)


@dataclass
class Outputs:
    """What a model returned.

    Args:
        tensors: The tensors in it, in the order of the walk.
        opaque: Names of the classes of objects that could not be looked into.

    >>> found = Outputs.of({"a": torch.zeros(2), "b": types.SimpleNamespace(c=[torch.zeros(3)])})
    >>> [tuple(t.shape) for t in found.tensors], found.opaque
    ([(2,), (3,)], set())
    """

    tensors: list[Tensor] = field(default_factory=list)
    opaque: set[str] = field(default_factory=set)
    _seen: dict[int, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, value: Any) -> Outputs:
        """Walk through containers, iterators, and the attributes of objects; an iterator is used up."""
        found = cls()
        found._add(value)
        found._seen.clear()
        return found

    def _add(self, value: Any) -> None:
        if isinstance(value, (*_PLAIN, *_PLAIN_TORCH, *_CODE)):
            return
        if isinstance(value, Tensor):
            # One tensor under two names is two outputs, as it always was for lists and dictionaries.
            self.tensors.append(value)
            return
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, (set, frozenset)):
            parts: list[Any] = sorted(value, key=_order)
        elif isinstance(value, Mapping):
            parts = list(value.values())
        elif isinstance(value, (tuple, list, Iterator)):
            parts = list(value)
        else:
            parts = list(_attributes(value))
            if not parts and not _has_dict(value) and not any("__slots__" in vars(k) for k in type(value).__mro__):
                self.opaque.add(f"{type(value).__module__}.{type(value).__qualname__}")
        for part in parts:
            self._add(part)


def _order(value: Any) -> tuple[int, ...]:
    """Order the members of a set by their shapes, since its own order differs from run to run."""
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _has_dict(value: Any) -> bool:
    return type(value).__dictoffset__ != 0


def _attributes(value: Any) -> Iterator[Any]:
    """Yield the values of an object's attributes, those in slots included."""
    if _has_dict(value):
        yield from vars(value).values()
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            member = vars(kind).get(name)
            if isinstance(member, types.MemberDescriptorType):
                try:
                    yield member.__get__(value)
                except AttributeError:
                    continue  # a slot without a value
