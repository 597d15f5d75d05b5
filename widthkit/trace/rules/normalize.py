"""Normalisations: affine parameters and statistics are tied with the channels they scale."""

from __future__ import annotations

import numpy as np

from widthkit.trace.context import OpContext
from widthkit.trace.labels import Alternative
from widthkit.trace.rules import rule
from widthkit.trace.rules.pointwise import broadcast_tie

_AFFINE = ("weight", "bias", "running_mean", "running_var")


@rule("batch_norm", "instance_norm", "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training")
def channel_norm(ctx: OpContext) -> None:
    """Tie dim 1 with weight, bias and running statistics."""
    x = ctx.arg("input")
    dims = list(ctx.dims(x))
    vectors = [ctx.arg(name) for name in _AFFINE]
    sides = [(ctx.dims(t)[0], len(t)) for t in vectors if t is not None]
    dims[1] = ctx.match((dims[1], x.shape[1]), *sides)
    ctx.attribute("num_features", dims[1])
    ctx.set(ctx.outputs()[0], tuple(dims))


@rule("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def layer_norm(ctx: OpContext) -> None:
    """Tie the last dims with the affine parameters; statistics are taken over the remaining channels."""
    x = ctx.arg("input")
    n = len(ctx.arg("normalized_shape"))
    dims = list(ctx.dims(x))
    vectors = [t for t in (ctx.arg("weight"), ctx.arg("bias")) if t is not None]
    for i in range(n):
        d = x.ndim - n + i
        dims[d] = ctx.match((dims[d], x.shape[d]), *[(ctx.dims(t)[i], t.shape[i]) for t in vectors])
        ctx.attribute("normalized_shape", dims[d], element=i)
    ctx.set(ctx.outputs()[0], tuple(dims))


@rule("group_norm", "native_group_norm")
def group_norm(ctx: OpContext) -> None:
    """Drop the same positions of every norm group, or whole norm groups."""
    x = ctx.arg("input")
    groups = int(ctx.arg("num_groups", ctx.arg("group", 1)))
    dims = list(ctx.dims(x))
    vectors = [t for t in (ctx.arg("weight"), ctx.arg("bias")) if t is not None]
    channels = dims[1] = ctx.match((dims[1], x.shape[1]), *[(ctx.dims(t)[0], len(t)) for t in vectors])
    ctx.attribute("num_channels", channels)
    if channels is not None and groups > 1:
        head = ctx.new(groups)
        ctx.attribute("num_groups", head)
        rows = channels.reshape(groups, -1)
        whole = Alternative("whole norm groups", ((channels, np.repeat(head, rows.shape[1])),))
        same = Alternative(
            "positions in every norm group",
            tuple((rows[0], row) for row in rows[1:]),
            (head, *((channels,) if rows.shape[1] == 1 else ())),
        )
        ctx.choose(f"has {groups} groups", [whole] if rows.shape[1] == 1 else [same, whole])
    ctx.set(ctx.outputs()[0], tuple(dims))


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(ctx: OpContext) -> None:
    """Tie a weight with the vector that says how long its slices are."""
    direction, length = ctx.tensors()[:2]
    ctx.set(ctx.outputs()[0], broadcast_tie(ctx, [direction, length], direction))
