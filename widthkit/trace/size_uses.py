"""Record where Python integers become tensor sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from widthkit.trace.context import flat_tensors
from widthkit.trace.labels import Labels
from widthkit.trace.recording import Recording
from widthkit.trace.sizes import DimSource, Source, TracedInt


@dataclass(frozen=True, eq=False)
class SizeUse:
    """An integer that must equal the number of kept positions of a dim.

    Args:
        source: Where the integer comes from.
        labels: The labels of the dim; ``None`` where its size is fixed.
        where: Path of the module that used it.
    """

    source: Source
    labels: Labels | None
    where: str


@dataclass
class SizeUseRecorder(TorchFunctionMode):
    """Collects the size uses of one run, and makes ``x.shape`` return traced integers.

    Args:
        recording: The recording of the run; its labels say what sizes mean.
        stack: The running modules.
        uses: What was collected.
    """

    recording: Recording
    stack: list[tuple[str, Any]]
    uses: list[SizeUse] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, then record which of its integers are sizes."""
        kwargs = kwargs or {}
        if _is_shape(func):
            return self._shape(args[0], func(*args, **kwargs))
        name = getattr(func, "__name__", "")
        if name == "size":
            return self._size(args, kwargs, func(*args, **kwargs))
        if name in _PYTHON_FUNCTIONS and isinstance(func, FunctionType):
            with self:
                return _without_overrides(func)(*args, **kwargs)
        if not any(_traced_ints((args, tuple(kwargs.values())))):
            return func(*args, **kwargs)
        self.recording.counting_arguments = _counting_arguments(name, args, kwargs)
        try:
            out = func(*args, **kwargs)
        finally:
            self.recording.counting_arguments = {}
        handler = _HANDLERS.get(name)
        if handler is not None:
            handler(self, args, kwargs, out)
        return out

    def _shape(self, tensor: Tensor, shape: torch.Size) -> torch.Size:
        dims = self.recording.dims_of(tensor)
        if all(labels is None for labels in dims):
            return shape
        pairs = zip(shape, dims, strict=True)
        return torch.Size([n if labels is None else TracedInt(n, DimSource(labels)) for n, labels in pairs])

    def _size(self, args: Any, kwargs: Any, out: Any) -> Any:
        if not isinstance(args[0], Tensor):
            return out
        if isinstance(out, torch.Size):
            return self._shape(args[0], out)
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        labels = self.recording.dims_of(args[0])[dim] if isinstance(dim, int) else None
        return out if labels is None else TracedInt(out, DimSource(labels))

    def record_size(self, value: Any, labels: Labels | None, size: int) -> None:
        """Record that an integer is the size of a dim."""
        if isinstance(value, TracedInt) and int(value) == size:
            self.uses.append(SizeUse(value.source, labels, self.stack[-1][0]))

    def record_sizes(self, values: Sequence[Any], tensor: Tensor, start: int = 0) -> None:
        """Record that integers are the sizes of consecutive dims."""
        dims = self.recording.dims_of(tensor)[start:]
        for value, labels, size in zip(values, dims, tensor.shape[start:], strict=False):
            self.record_size(value, labels, size)

    def record_bound(self, value: Any, labels: Labels | None, size: int) -> None:
        """Record that an integer bounds a slice: it counts the positions before the bound."""
        if isinstance(value, TracedInt) and 0 < int(value) <= size:
            before = None if labels is None else labels[: int(value)]
            self.uses.append(SizeUse(value.source, before, self.stack[-1][0]))


_PYTHON_FUNCTIONS = {"multi_head_attention_forward", "_in_projection_packed", "_in_projection"}
"""Functions of torch that are written in Python and compute with sizes."""
_copies: dict[Any, Callable[..., Any]] = {}


def _without_overrides(func: Any) -> Callable[..., Any]:
    """Return a copy of a Python function of torch in which the calls it makes reach the active modes.

    The original would hand itself to the mode as one call again.
    """
    if func not in _copies:
        never = lambda *_, **__: False  # noqa: E731
        names = ("has_torch_function", "has_torch_function_variadic", "has_torch_function_unary")
        space = {**func.__globals__, **dict.fromkeys(names, never)}
        copied = FunctionType(func.__code__, space, func.__name__, func.__defaults__, func.__closure__)
        copied.__kwdefaults__ = func.__kwdefaults__
        _copies[func] = copied
    return _copies[func]


_COUNTING_ARGUMENTS = {
    **{f"conv{t}{n}d": ("groups", 6) for t in ("", "_transpose") for n in (1, 2, 3)},
    "group_norm": ("num_groups", 1),
    "layer_norm": ("normalized_shape", 1),
    "rms_norm": ("normalized_shape", 1),
}
"""Function -> name and position of an argument that counts channels but is not the size of a dim."""


def _counting_arguments(name: str, args: Any, kwargs: Any) -> dict[str, Any]:
    if name not in _COUNTING_ARGUMENTS:
        return {}
    argument, place = _COUNTING_ARGUMENTS[name]
    return {argument: args[place] if len(args) > place else kwargs.get(argument)}


def _is_shape(func: Any) -> bool:
    return getattr(func, "__name__", "") == "__get__" and getattr(func, "__self__", None) is torch.Tensor.shape


def _traced_ints(value: Any) -> Iterator[bool]:
    """Yield ``True`` for every traced integer in nested tuples, lists and slices."""
    if isinstance(value, TracedInt):
        yield True
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _traced_ints(item)
    elif isinstance(value, slice):
        yield from _traced_ints((value.start, value.stop))


def _flat(values: Sequence[Any]) -> list[Any]:
    return [v for value in values for v in (value if isinstance(value, (tuple, list)) else (value,))]


def _given_sizes(args: Any, kwargs: Any, *names: str) -> list[Any]:
    """Return the sizes that a call was given after its tensor, by position or by name."""
    values = [*args[1:], *(kwargs[name] for name in names if name in kwargs)]
    return _flat([v for v in values if isinstance(v, (int, tuple, list))])


def _view(recorder: SizeUseRecorder, args: Any, kwargs: Any, out: Any) -> None:
    if isinstance(out, Tensor):
        recorder.record_sizes(_given_sizes(args, kwargs, "shape", "size"), out)


def _create(recorder: SizeUseRecorder, args: Any, kwargs: Any, out: Any) -> None:
    if isinstance(out, Tensor):
        sizes = [v for v in (*args, kwargs.get("size")) if isinstance(v, (int, tuple, list))]
        recorder.record_sizes(_flat(sizes), out)


def _unflatten(recorder: SizeUseRecorder, args: Any, kwargs: Any, out: Tensor) -> None:
    dim = args[1] if len(args) > 1 else kwargs["dim"]
    sizes = args[2] if len(args) > 2 else kwargs["sizes"]
    recorder.record_sizes(sizes, out, dim % args[0].ndim)


def _split(recorder: SizeUseRecorder, args: Any, kwargs: Any, out: Any) -> None:
    x = args[0]
    names = ("split_size_or_sections", "split_size", "split_sizes")
    sizes = args[1] if len(args) > 1 else next(kwargs[n] for n in names if n in kwargs)
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % x.ndim
    parts = flat_tensors(out)
    for value, part in zip(sizes if isinstance(sizes, (tuple, list)) else [sizes] * len(parts), parts, strict=False):
        recorder.record_size(value, recorder.recording.dims_of(part)[dim], part.shape[dim])


def _narrow(recorder: SizeUseRecorder, args: Any, kwargs: Any, out: Tensor) -> None:
    x, dim, start, length = (*args, *(kwargs[n] for n in ("dim", "start", "length") if n in kwargs))[:4]
    dim = dim % x.ndim
    recorder.record_bound(start, recorder.recording.dims_of(x)[dim], x.shape[dim])
    recorder.record_size(length, recorder.recording.dims_of(out)[dim], out.shape[dim])


def _index(recorder: SizeUseRecorder, args: Any, kwargs: Any, out: Any) -> None:
    x, key = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
    dim = 0
    for place, item in enumerate(key):
        if item is Ellipsis:
            dim = x.ndim - sum(k is not None for k in key[place + 1 :])
        elif item is not None:
            if isinstance(item, slice) and item.step in (None, 1) and dim < x.ndim:
                for bound in (item.start, item.stop):
                    recorder.record_bound(bound, recorder.recording.dims_of(x)[dim], x.shape[dim])
            dim += 1


_HANDLERS: dict[str, Callable[[SizeUseRecorder, Any, Any, Any], None]] = {
    **dict.fromkeys(("view", "reshape", "expand", "_unsafe_view", "broadcast_to"), _view),
    **dict.fromkeys(("zeros", "ones", "empty", "full", "randn", "rand", "new_zeros", "new_ones", "new_empty"), _create),
    "unflatten": _unflatten,
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "narrow": _narrow,
    **dict.fromkeys(("__getitem__", "__setitem__"), _index),
}
