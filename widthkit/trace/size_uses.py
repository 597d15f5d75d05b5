"""ClaimWatch numbers on their way into tensor operations, and shapes on their way out."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from widthkit.trace.context import RunState, flat_tensors
from widthkit.trace.labels import Labels
from widthkit.trace.sizes import Number, Size, Source


@dataclass(frozen=True, eq=False)
class Claim:
    """A number that must equal the positions left of a dim; ``labels`` is ``None`` where the dim is fixed."""

    source: Source
    value: int
    labels: Labels | None
    where: str


@dataclass
class ClaimWatch(TorchFunctionMode):
    """Collects claims of one run.

    Args:
        run: The record of the run; its labels say what sizes mean.
        stack: The running modules.
    """

    run: RunState
    stack: list[tuple[str, Any]]
    claims: list[Claim] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, then read off what its numbers say."""
        kwargs = kwargs or {}
        if _is_shape(func):
            return self._shape(args[0], func(*args, **kwargs))
        name = getattr(func, "__name__", "")
        if name == "size":
            return self._size(args, kwargs, func(*args, **kwargs))
        if name in _PYTHON and isinstance(func, _Function):
            with self:
                return _open(func)(*args, **kwargs)
        numbers = list(_numbers((args, tuple(kwargs.values()))))
        if not numbers:
            return func(*args, **kwargs)
        self.run.numbers = _roles(name, args, kwargs)
        try:
            out = func(*args, **kwargs)
        finally:
            self.run.numbers = {}
        handler = _HANDLERS.get(name)
        if handler is not None:
            handler(self, args, kwargs, out)
        return out

    def _shape(self, tensor: Tensor, shape: torch.Size) -> torch.Size:
        dims = self.run.dims_of(tensor)
        if all(labels is None for labels in dims):
            return shape
        sizes = [n if labels is None else Number(n, Size(labels)) for n, labels in zip(shape, dims, strict=True)]
        return torch.Size(sizes)

    def _size(self, args: Any, kwargs: Any, out: Any) -> Any:
        if not isinstance(args[0], Tensor):
            return out
        if isinstance(out, torch.Size):
            return self._shape(args[0], out)
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        labels = self.run.dims_of(args[0])[dim] if isinstance(dim, int) else None
        return out if labels is None else Number(out, Size(labels))

    def claim(self, value: Any, labels: Labels | None, size: int) -> None:
        """Note that a number is the size of a dim."""
        if isinstance(value, Number) and int(value) == size:
            self.claims.append(Claim(value.source, int(value), labels, self.stack[-1][0]))

    def sizes(self, values: Sequence[Any], tensor: Tensor, start: int = 0) -> None:
        """Note the sizes of consecutive dims."""
        for value, labels, size in zip(values, self.run.dims_of(tensor)[start:], tensor.shape[start:], strict=False):
            self.claim(value, labels, size)

    def first(self, value: Any, labels: Labels | None, size: int) -> None:
        """Note that a number counts the first positions of a dim, or the last where it is negative."""
        if isinstance(value, Number) and 0 < int(value) <= size:
            part = None if labels is None else labels[: int(value)]
            self.claims.append(Claim(value.source, int(value), part, self.stack[-1][0]))


_Function = types.FunctionType
_PYTHON = {"multi_head_attention_forward", "_in_projection_packed", "_in_projection"}
"""Functions of torch that are written in Python and do arithmetic with sizes inside."""
_opened: dict[Any, Callable[..., Any]] = {}


_ROLES = {
    **{f"conv{t}{n}d": ("groups", 6) for t in ("", "_transpose") for n in (1, 2, 3)},
    "group_norm": ("num_groups", 1),
    "layer_norm": ("normalized_shape", 1),
    "rms_norm": ("normalized_shape", 1),
}
"""Arguments that count channels without being the size of a dim: name and position."""


def _roles(name: str, args: Any, kwargs: Any) -> dict[str, Any]:
    if name not in _ROLES:
        return {}
    role, place = _ROLES[name]
    return {role: args[place] if len(args) > place else kwargs.get(role)}


def _open(func: Any) -> Callable[..., Any]:
    """Return a copy of a Python function of torch that does not ask for overrides of itself, so that we see inside."""
    if func not in _opened:
        never = lambda *_, **__: False  # noqa: E731
        names = ("has_torch_function", "has_torch_function_variadic", "has_torch_function_unary")
        space = {**func.__globals__, **dict.fromkeys(names, never)}
        copied = types.FunctionType(func.__code__, space, func.__name__, func.__defaults__, func.__closure__)
        copied.__kwdefaults__ = func.__kwdefaults__
        _opened[func] = copied
    return _opened[func]


def _is_shape(func: Any) -> bool:
    return getattr(func, "__name__", "") == "__get__" and getattr(func, "__self__", None) is torch.Tensor.shape


def _numbers(value: Any) -> Iterator[Number]:
    if isinstance(value, Number):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, slice):
        yield from _numbers((value.start, value.stop))


def _flat(values: Sequence[Any]) -> list[Any]:
    return [v for value in values for v in (value if isinstance(value, (tuple, list)) else (value,))]


def _given(args: Any, kwargs: Any, *names: str) -> list[Any]:
    """The sizes that a call was given after its tensor, by position or by name."""
    values = [*args[1:], *(kwargs[name] for name in names if name in kwargs)]
    return _flat([v for v in values if isinstance(v, (int, tuple, list))])


def _view(watch: ClaimWatch, args: Any, kwargs: Any, out: Any) -> None:
    if isinstance(out, Tensor):
        watch.sizes(_given(args, kwargs, "shape", "size"), out)


def _create(watch: ClaimWatch, args: Any, kwargs: Any, out: Any) -> None:
    if isinstance(out, Tensor):
        watch.sizes(_flat([v for v in (*args, kwargs.get("size")) if isinstance(v, (int, tuple, list))]), out)


def _unflatten(watch: ClaimWatch, args: Any, kwargs: Any, out: Tensor) -> None:
    dim = args[1] if len(args) > 1 else kwargs["dim"]
    sizes = args[2] if len(args) > 2 else kwargs["sizes"]
    watch.sizes(sizes, out, dim % args[0].ndim)


def _split(watch: ClaimWatch, args: Any, kwargs: Any, out: Any) -> None:
    x = args[0]
    names = ("split_size_or_sections", "split_size", "split_sizes")
    sizes = args[1] if len(args) > 1 else next(kwargs[n] for n in names if n in kwargs)
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % x.ndim
    pieces = flat_tensors(out)
    for value, piece in zip(sizes if isinstance(sizes, (tuple, list)) else [sizes] * len(pieces), pieces, strict=False):
        watch.claim(value, watch.run.dims_of(piece)[dim], piece.shape[dim])


def _narrow(watch: ClaimWatch, args: Any, kwargs: Any, out: Tensor) -> None:
    x, dim, start, length = (*args, *(kwargs[n] for n in ("dim", "start", "length") if n in kwargs))[:4]
    dim = dim % x.ndim
    watch.first(start, watch.run.dims_of(x)[dim], x.shape[dim])
    watch.claim(length, watch.run.dims_of(out)[dim], out.shape[dim])


def _index(watch: ClaimWatch, args: Any, kwargs: Any, out: Any) -> None:
    x, key = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
    dim = 0
    for place, item in enumerate(key):
        if item is Ellipsis:
            dim = x.ndim - sum(k is not None for k in key[place + 1 :])
        elif item is not None:
            if isinstance(item, slice) and item.step in (None, 1) and dim < x.ndim:
                for end in (item.start, item.stop):
                    watch.first(end, watch.run.dims_of(x)[dim], x.shape[dim])
            dim += 1


_HANDLERS: dict[str, Callable[[ClaimWatch, Any, Any, Any], None]] = {
    **dict.fromkeys(("view", "reshape", "expand", "_unsafe_view", "broadcast_to"), _view),
    **dict.fromkeys(("zeros", "ones", "empty", "full", "randn", "rand", "new_zeros", "new_ones", "new_empty"), _create),
    "unflatten": _unflatten,
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "narrow": _narrow,
    **dict.fromkeys(("__getitem__", "__setitem__"), _index),
}
