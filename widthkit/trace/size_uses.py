"""Record where Python integers become tensor sizes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from widthkit.trace.context import flat_tensors
from widthkit.trace.labels import Labels
from widthkit.trace.recording import Recording, SizeUse
from widthkit.trace.sizes import Comparison, ComputedSource, DimSource, Source, TracedInt, Untraced, source_of


@dataclass
class SizeUseRecorder(TorchFunctionMode):
    """Collects the size uses and comparisons of one run, and makes ``x.shape`` return traced integers.

    Args:
        recording: The recording of the run; its labels say what sizes mean.
        stack: The running modules.
        inside: Whether a function of torch runs. What it compares is not the model's control flow.
    """

    recording: Recording
    stack: list[tuple[str, Any]]
    inside: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def watch(self, event: Comparison | Untraced) -> None:
        """Record what the model's own code, not torch's, does with a traced integer."""
        path, module = self.stack[-1] if self.stack else ("", None)
        if self.inside or type(module).__module__.startswith("torch.nn."):
            return
        if isinstance(event, Comparison):
            self.recording.comparisons.append(replace(event, path=path))
        else:
            self.recording.untraced.append(replace(event, path=path))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, then record which of its integers are sizes."""
        before, self.inside = self.inside, True
        try:
            return self._run(func, args, kwargs or {})
        finally:
            self.inside = before

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if _is_shape(func):
            return self._shape(args[0], func(*args, **kwargs))
        name = getattr(func, "__name__", "")
        if name == "size":
            return self._size(args, kwargs, func(*args, **kwargs))
        if name in ("numel", "nelement") and isinstance(args[0], Tensor):
            return functools.reduce(operator.mul, self._shape(args[0], args[0].shape)) if args[0].ndim else func(*args)
        if name in _PYTHON_FUNCTIONS and isinstance(func, FunctionType):
            with self:
                return _without_overrides(func)(*args, **kwargs)
        if name not in _CUTS and not any(_traced_ints((args, tuple(kwargs.values())))):
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
        return torch.Size([n if labels is None else TracedInt(n, DimSource(labels), self.watch) for n, labels in pairs])

    def _size(self, args: Any, kwargs: Any, out: Any) -> Any:
        if not isinstance(args[0], Tensor):
            return out
        if isinstance(out, torch.Size):
            return self._shape(args[0], out)
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        labels = self.recording.dims_of(args[0])[dim] if isinstance(dim, int) else None
        return out if labels is None else TracedInt(out, DimSource(labels), self.watch)

    def record_size(self, value: Any, labels: Labels | None, size: int) -> None:
        """Record that an integer is the size of a dim."""
        if isinstance(value, TracedInt) and int(value) == size:
            self.recording.size_uses.append(SizeUse(value.source, labels, self.stack[-1][0]))

    def record_sizes(self, values: Sequence[Any], tensor: Tensor, start: int = 0) -> None:
        """Record that integers are the sizes of consecutive dims."""
        dims = self.recording.dims_of(tensor)[start:]
        for value, labels, size in zip(values, dims, tensor.shape[start:], strict=False):
            self.record_size(value, labels, size)

    def record_bound(self, value: Any, labels: Labels | None, size: int) -> None:
        """Record that an integer bounds a slice: it counts the positions before the bound, a negative one those behind.

        Also a plain integer is recorded, since a slice whose bound stays runs at every width.
        """
        if not isinstance(value, int) or not -size <= int(value) <= size or not int(value):
            return
        bound = int(value)
        if abs(bound) == size and not isinstance(value, TracedInt):
            return  # everything is cut off, at smaller widths as well
        if bound > 0:
            self._record_part(source_of(value), None if labels is None else labels[:bound])
        else:
            self._record_part(source_of(value), None if labels is None else labels[bound:], negative=True)

    def record_part(self, value: Any, labels: Labels | None, size: int) -> None:
        """Record that an integer, also a plain one, is the size of a part that is cut off a dim."""
        if isinstance(value, int) and int(value) == size:
            self._record_part(source_of(value), labels)

    def _record_part(self, source: Source | int, labels: Labels | None, negative: bool = False) -> None:
        if isinstance(source, int):
            if labels is not None:
                self.recording.size_uses.append(SizeUse(abs(source), labels, self.stack[-1][0]))
            return
        own = ComputedSource("sub", 0, source) if negative else source
        self.recording.size_uses.append(SizeUse(own, labels, self.stack[-1][0]))


_CUTS = {"__getitem__", "__setitem__", "narrow", "split", "split_with_sizes"}
"""Functions that cut a dim at bounds; with plain integers as well, they may run at widths where they are wrong."""
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
        recorder.record_part(value, recorder.recording.dims_of(part)[dim], part.shape[dim])


def _narrow(recorder: SizeUseRecorder, args: Any, kwargs: Any, out: Tensor) -> None:
    x, dim, start, length = (*args, *(kwargs[n] for n in ("dim", "start", "length") if n in kwargs))[:4]
    dim = dim % x.ndim
    recorder.record_bound(start, recorder.recording.dims_of(x)[dim], x.shape[dim])
    recorder.record_part(length, recorder.recording.dims_of(out)[dim], out.shape[dim])


def _index(recorder: SizeUseRecorder, args: Any, kwargs: Any, out: Any) -> None:
    x, key = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
    dim = 0
    for place, item in enumerate(key):
        if item is Ellipsis:
            dim = x.ndim - sum(k is not None for k in key[place + 1 :])
        elif item is not None:
            if isinstance(item, slice) and dim < x.ndim:
                for bound in (item.start, item.stop):
                    recorder.record_bound(bound, recorder.recording.dims_of(x)[dim], x.shape[dim])
            dim += item.ndim if isinstance(item, Tensor) and item.dtype == torch.bool else 1


_HANDLERS: dict[str, Callable[[SizeUseRecorder, Any, Any, Any], None]] = {
    **dict.fromkeys(("view", "reshape", "expand", "_unsafe_view", "broadcast_to"), _view),
    **dict.fromkeys(("zeros", "ones", "empty", "full", "randn", "rand", "new_zeros", "new_ones", "new_empty"), _create),
    "unflatten": _unflatten,
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "narrow": _narrow,
    **dict.fromkeys(("__getitem__", "__setitem__"), _index),
}
