"""Element-wise operators, which tie their operands; creating and copying tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from widthkit.trace.context import OpContext
from widthkit.trace.labels import Labels
from widthkit.trace.rules import rule


def broadcast_tie(ctx: OpContext, tensors: list[Tensor], out: Tensor) -> tuple[Labels | None, ...]:
    """Tie the operands dim by dim, as they broadcast, and return the labels of the result."""
    result: list[Labels | None] = []
    for back in range(out.ndim, 0, -1):
        sides = [(ctx.dims(t)[-back], t.shape[-back]) for t in tensors if t.ndim >= back]
        size = out.shape[-back]
        result.append(ctx.match(*[s for s in sides if s[1] == size]) if size != 1 else None)
    return tuple(result)


@rule("to", "type_as", "_to_copy")
def convert(ctx: OpContext) -> None:
    """Pass all labels; a second tensor only gives its type."""
    ctx.set(ctx.out, ctx.dims(ctx.tensors()[0]))


@rule(
    "pointwise",
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "native_dropout",
    "bernoulli",
    "relu6",
    "selu",
    "celu",
    "mish",
    "hardswish",
    "hardsigmoid",
    "hardtanh",
    "log_sigmoid",
    "softplus",
    "softsign",
    "leaky_relu",
    "rrelu",
    "gelu",
    "silu",
    "elu",
    "threshold",
    "clamp",
    "clip",
    "clone",
    "contiguous",
    "detach",
    "alias",
    "lift_fresh",
    "lift_fresh_copy",
    "positive",
    "square",
    "where",
    "masked_fill",
    "copysign",
    "addcmul",
    "addcdiv",
    "lerp",
    "nan_to_num",
    "float_power",
    "true_divide",
    "subtract",
    "multiply",
    "divide",
    "logical_not",
    "isnan",
    "isfinite",
    "view_dtype",
    "real",
    "requires_grad",
    "resolve_conj",
    "resolve_neg",
    "cpu",
    "cuda",
    "float",
    "half",
    "softmax_backward",
)
def pointwise(ctx: OpContext) -> None:
    """Tie all operands; dims that broadcast stay untied."""
    tensors = ctx.tensors()
    for out in ctx.outputs():
        if all(t.ndim <= out.ndim for t in tensors):
            ctx.set(out, broadcast_tie(ctx, tensors, out))
        else:
            for t in tensors:
                ctx.freeze_tensor(t, "has operands of more dims than its result")


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "normalize")
def same_shape(ctx: OpContext) -> None:
    """Pass all labels: the operator mixes positions of one dim but commutes with permutations of it."""
    ctx.set(ctx.out, ctx.dims(ctx.tensors()[0]))


@rule("prelu", "_prelu_kernel")
def prelu(ctx: OpContext) -> None:
    """Tie the slopes with the channels."""
    x, weight = ctx.tensors()[:2]
    dims = list(ctx.dims(x))
    if weight.numel() > 1:
        ctx.match((dims[1], x.shape[1]), (ctx.dims(weight)[-1 if weight.ndim == 1 else 1], weight.numel()))
        ctx.attribute("num_parameters", dims[1])
    ctx.set(ctx.out, tuple(dims))


@rule("copy")
def copy(ctx: OpContext) -> None:
    """Tie the written tensor with the one that it is written to."""
    target, source = ctx.tensors()[:2]
    ctx.set(ctx.out, broadcast_tie(ctx, [target, source], target))


@rule("index_put", "_index_put_impl")
def index_put(ctx: OpContext) -> None:
    """Freeze the indexed dims, and tie the dims behind them with those of the written values."""
    target, values, indices = ctx.arg("self"), ctx.arg("values"), ctx.arg("indices")
    dims, written = list(ctx.dims(target)), ctx.dims(values)
    n_indexed = sum(i.ndim if i.dtype == torch.bool else 1 for i in indices if i is not None)
    rest = 0 if any(i is None for i in indices) else target.ndim - n_indexed
    for labels in [*dims[: target.ndim - rest], *written[: max(0, values.ndim - rest)]]:
        ctx.freeze(labels, "writes to places picked along this dim")
    for back in range(1, min(rest, values.ndim) + 1):
        dims[-back] = ctx.match((dims[-back], target.shape[-back]), (written[-back], values.shape[-back]))
    ctx.set(ctx.out, tuple(dims))


@rule(
    "empty",
    "zeros",
    "ones",
    "full",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "rand",
    "randn",
    "rand_like",
    "randn_like",
    "scalar_tensor",
    "empty_strided",
    "new_empty_strided",
)
def create(ctx: OpContext) -> None:
    """Give a new tensor new labels: its sizes follow what is written into it."""
    for out in ctx.outputs():
        like = ctx.tensors()[0] if ctx.name.endswith("_like") and ctx.tensors() else None
        ctx.set(out, ctx.dims(like) if like is not None else tuple(ctx.new(n) if n > 1 else None for n in out.shape))


@rule("arange", "linspace", "logspace", "range", "eye", "tril_indices", "triu_indices", "randperm", "hann_window")
def enumerate_positions(ctx: OpContext) -> None:
    """Leave positions fixed: each has its own value, so none can be exchanged or dropped."""


@rule("sym_size", "sym_numel", "sym_stride", "size", "dim", "numel", "is_nonzero", "_local_scalar_dense", "item")
def python_value(ctx: OpContext) -> None:
    """Tie nothing: these operators return Python values."""


@rule("fill", "zero", "uniform", "normal", "trunc_normal", "random", "record_stream", "set")
def overwrite(ctx: OpContext) -> None:
    """Overwrite a tensor in place with values of its own shape."""
    for out in ctx.outputs():
        if id(out) not in ctx.recording.dims and ctx.tensors():
            ctx.set(out, ctx.dims(ctx.tensors()[0]))
