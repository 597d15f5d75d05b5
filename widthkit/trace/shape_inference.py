"""Shape inference for common operators on the meta device.

On the meta device only the shape, type and strides of a result matter. PyTorch computes them in Python, through many
layers, which takes up to a millisecond a call and half of the time of a trace (docs/tracer.md has figures). The
functions here answer valid calls on contiguous tensors of one floating-point type. All other calls, also those that
must raise, are left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

POINTWISE = {
    *("relu", "relu6", "gelu", "silu", "mish", "elu", "selu", "leaky_relu", "softplus", "hardtanh"),
    *("hardswish", "hardsigmoid", "sigmoid", "tanh", "exp", "sqrt", "rsqrt", "neg", "abs", "square", "reciprocal"),
    *("add", "sub", "mul", "div", "clamp", "clamp_min"),
}
"""Operators that return a tensor of the type of their arguments, in the shape that these broadcast to."""
Shape = tuple[int, ...]


def infer(func: Any, args: Any, kwargs: Any) -> Any:
    """Return what ``func(*args, **kwargs)`` returns on the meta device; ``None`` where only PyTorch can tell.

    Args:
        func: The ATen operator.
        args: Positional arguments.
        kwargs: Keyword arguments.

    >>> x = torch.empty(2, 8, 4, 4, device="meta")
    >>> out = infer(torch.ops.aten.relu.default, (x,), {})
    >>> out.shape, infer(torch.ops.aten.add.Tensor, (x, x[:, :3]), {})
    (torch.Size([2, 8, 4, 4]), None)
    """
    name = func.overloadpacket.__name__
    if func.namespace != "aten":
        return None
    if name == "clamp" and all(v is None for v in [*args[1:], *kwargs.values()]):
        return None
    if name in POINTWISE:
        return _pointwise(args, kwargs)
    if name.endswith("_") and name[:-1] in POINTWISE:
        return _in_place(args, kwargs)
    handler = HANDLERS.get(name)
    return None if handler is None else handler(args, kwargs)


def _are_plain(*tensors: Any) -> bool:
    """Whether all are contiguous tensors of one floating-point type on the meta device; ``None`` is skipped."""
    dtype = tensors[0].dtype
    return dtype.is_floating_point and all(
        t is None or (isinstance(t, Tensor) and t.is_meta and t.dtype == dtype and _has_default_strides(t))
        for t in tensors
    )


def _has_default_strides(tensor: Tensor) -> bool:
    """Whether the strides are those of a new tensor; a contiguous tensor may have others along dims of size 1."""
    if not tensor.is_contiguous():
        return False
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != expected:
            return False
        expected *= max(size, 1)
    return True


def _broadcast(args: Any, kwargs: Any) -> tuple[Shape, list[Tensor]] | None:
    """Return the shape that the tensors of a pointwise call broadcast to, and the tensors; ``None`` in doubt."""
    values = [*args, *kwargs.values()]
    tensors = [v for v in values if isinstance(v, Tensor)]
    if not tensors or any(isinstance(v, (str, complex, torch.dtype, torch.memory_format, list)) for v in values):
        return None
    if not _are_plain(*tensors):
        return None
    largest = max(tensors, key=lambda t: (t.ndim, t.numel()))
    shape = tuple(largest.shape)
    for tensor in tensors:
        offset = len(shape) - tensor.ndim
        if any(n not in (1, shape[offset + i]) for i, n in enumerate(tensor.shape)):
            return None
    return shape, tensors


def _pointwise(args: Any, kwargs: Any) -> Tensor | None:
    found = _broadcast(args, kwargs)
    return None if found is None else _empty(found[0], found[1][0])


def _in_place(args: Any, kwargs: Any) -> Tensor | None:
    found = _broadcast(args, kwargs)
    if found is None or not isinstance(args[0], Tensor) or tuple(args[0].shape) != found[0]:
        return None
    target: Tensor = args[0]
    return target


def _empty(shape: Shape, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device="meta")


def _batch_norm(args: Any, kwargs: Any) -> Tensor | None:
    x, rest = args[0], args[1:5]
    if (
        kwargs
        or len(args) < 6
        or args[5]
        or x.ndim < 2
        or not x.shape[1]
        or not _are_plain(x, *rest)
        or rest[2] is None
        or rest[3] is None
    ):
        return None
    return _empty(tuple(x.shape), x) if all(t is None or t.shape == (x.shape[1],) for t in rest) else None


def _layer_norm(args: Any, kwargs: Any) -> Tensor | None:
    x, shape = args[0], tuple(args[1])
    rest = args[2:4]
    if kwargs or not shape or not _are_plain(x, *rest) or tuple(x.shape[-len(shape) :]) != shape:
        return None
    return _empty(tuple(x.shape), x) if all(t is None or tuple(t.shape) == shape for t in rest) else None


def _group_norm(args: Any, kwargs: Any) -> Tensor | None:
    x, groups = args[0], args[1]
    rest = args[2:4]
    if kwargs or x.ndim < 2 or not _are_plain(x, *rest) or groups < 1 or x.shape[1] % groups:
        return None
    return _empty(tuple(x.shape), x) if all(t is None or t.shape == (x.shape[1],) for t in rest) else None


def _linear(args: Any, kwargs: Any) -> Tensor | None:
    x, weight = args[:2]
    bias = args[2] if len(args) > 2 else None
    if kwargs or x.ndim < 2 or weight.ndim != 2 or not _are_plain(x, weight, bias) or x.shape[-1] != weight.shape[1]:
        return None
    if bias is not None and bias.shape != (weight.shape[0],):
        return None
    return _empty((*x.shape[:-1], weight.shape[0]), x)


def _attention(args: Any, kwargs: Any) -> Tensor | None:
    """Answer for queries, keys and values ``[..., tokens, head dim]`` of equal leading sizes, without a mask."""
    if len(args) != 3 or not set(kwargs) <= {"dropout_p", "scale"} or kwargs.get("dropout_p"):
        return None
    query, key, value = args
    if not all(t.is_meta and t.ndim > 2 and t.dtype == query.dtype for t in args) or not query.is_floating_point():
        return None
    if query.shape[:-2] != key.shape[:-2] or key.shape[:-1] != value.shape[:-1] or query.shape[-1] != key.shape[-1]:
        return None
    return _empty((*query.shape[:-1], value.shape[-1]), query)


def _mean(args: Any, kwargs: Any) -> Tensor | None:
    if kwargs or len(args) not in (2, 3) or not isinstance(args[1], (list, tuple)) or not args[1]:
        return None
    x, kept = args[0], len(args) > 2 and args[2]
    if not _are_plain(x) or not all(-x.ndim <= d < x.ndim for d in args[1]):
        return None
    dims = {d % x.ndim for d in args[1]}
    if len(dims) < len(args[1]):
        return None
    shape = tuple(1 if d in dims else n for d, n in enumerate(x.shape) if kept or d not in dims)
    return _empty(shape, x)


def _cat(args: Any, kwargs: Any) -> Tensor | None:
    if kwargs or not args[0]:
        return None
    first, dim = args[0][0], args[1] if len(args) > 1 else 0
    if not _are_plain(*args[0]) or not -first.ndim <= dim < first.ndim or any(t.ndim != first.ndim for t in args[0]):
        return None
    dim %= first.ndim
    rest = [(*t.shape[:dim], *t.shape[dim + 1 :]) for t in args[0]]
    if any(shape != rest[0] for shape in rest):
        return None
    return _empty((*first.shape[:dim], sum(t.shape[dim] for t in args[0]), *first.shape[dim + 1 :]), first)


def _lstm(args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """Answer for sequences that are not packed, without projections; PyTorch would run cell by cell."""
    if kwargs or len(args) != 9 or not isinstance(args[1], (list, tuple)) or (args[5] and args[6]):
        return None
    x, (h, c), params, has_biases, layers, _, _, both_ways, batch_first = args
    # PyTorch stacks the steps, so the result is contiguous along time whatever the layout of the input.
    if x.ndim != 3 or not x.is_meta or x.dtype != h.dtype or not _are_plain(h, c, *params):
        return None
    hidden, ways = h.shape[-1], 2 if both_ways else 1
    time, batch = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    if not all(x.shape) or h.shape != (layers * ways, batch, hidden) or c.shape != h.shape:
        return None
    expected: list[Shape] = []
    for layer in range(layers):
        inputs = hidden * ways if layer else x.shape[2]
        expected += [(4 * hidden, inputs), (4 * hidden, hidden), *([(4 * hidden,)] * 2 if has_biases else [])] * ways
    if [tuple(p.shape) for p in params] != expected:
        return None
    out = _empty((time, batch, hidden * ways), x)
    return out.transpose(0, 1) if batch_first else out, _empty(tuple(h.shape), x), _empty(tuple(c.shape), x)


HANDLERS: dict[str, Callable[[Any, Any], Any]] = {
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
    "mean": _mean,
    "cat": _cat,
    "lstm": _lstm,
}
"""Operator -> what infers its result; ``None`` leaves the call to PyTorch."""
