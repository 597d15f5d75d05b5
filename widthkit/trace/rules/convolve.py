"""Convolutions: dense, grouped, depthwise, transposed; one to three spatial dims."""

from __future__ import annotations

import math

import numpy as np

from widthkit.trace.context import OpContext
from widthkit.trace.labels import Alternative, Labels
from widthkit.trace.rules import rule


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def named_convolution(ctx: OpContext) -> None:
    """Handle the composite operators, which may have string padding (``"same"``, ``"valid"``)."""
    _convolve(ctx, transposed=ctx.name.startswith("conv_transpose"))


@rule("convolution", "_convolution")
def convolution(ctx: OpContext) -> None:
    """Handle the general operator that implements all convolutions."""
    _convolve(ctx, transposed=bool(ctx.arg("transposed")))


def _convolve(ctx: OpContext, *, transposed: bool) -> None:
    x, weight, bias, out = ctx.arg("input"), ctx.arg("weight"), ctx.arg("bias"), ctx.out
    groups = int(ctx.arg("groups", 1))
    n_spatial = weight.ndim - 2
    channel = x.ndim - n_spatial - 1
    x_dims, w_dims = ctx.dims(x), ctx.dims(weight)
    for labels in w_dims[2:]:
        ctx.freeze(labels, "slides this dim as a kernel")
    source = (x_dims[channel], x.shape[channel])
    if groups == 1:
        into, outof = (0, 1) if transposed else (1, 0)
        ctx.match(source, (w_dims[into], weight.shape[into]))
        result = w_dims[outof]
    else:
        result = _grouped(ctx, source, groups, transposed)
    if bias is not None:
        result = ctx.match((result, out.shape[channel]), (ctx.dims(bias)[0], len(bias)))
    ctx.attribute("in_channels", x_dims[channel])
    ctx.attribute("out_channels", result)
    space = _space(ctx, channel)
    # In lambda layers a dim that the kernel slides along holds channels.
    counted = (x if transposed else out).shape
    lead = [(x_dims[d], counted[d]) for d in range(channel)]
    places = lead + [(labels, counted[channel + 1 + i]) for i, labels in enumerate(space)]
    kernel = math.prod(weight.shape[2:])
    ctx.macs([(w_dims[0], weight.shape[0]), (w_dims[1], weight.shape[1]), *places], scale=kernel)
    ctx.set(out, (*x_dims[:channel], result, *space))


def _grouped(ctx: OpContext, source: tuple[Labels | None, int], groups: int, transposed: bool) -> Labels | None:
    """Couple a grouped convolution: drop the same positions of every group, or whole groups.

    The solver takes what leaves more free. With one input channel per group (depthwise) the input can only lose whole
    groups.
    """
    weight, out_size = ctx.arg("weight"), ctx.out.shape[ctx.out.ndim - (ctx.arg("weight").ndim - 2) - 1]
    n_in, n_out = source[1] // groups, out_size // groups
    own, other = ctx.dims(weight)[0], ctx.dims(weight)[1]
    x = source[0]
    if x is None:
        x = ctx.new(source[1])
        ctx.freeze(x, f"reads a dim of fixed size {source[1]}")
    if transposed:
        if own is not None:
            ctx.recording.store.tie(x, own)
        y, inner_in, inner_out = ctx.new(out_size), None, other
    else:
        y, inner_in, inner_out = own if own is not None else ctx.new(out_size), other, None
    head = ctx.new(groups)
    ctx.attribute("groups", head)
    x_rows, y_rows = x.reshape(groups, n_in), y.reshape(groups, n_out)
    whole = Alternative(
        "whole groups",
        ((x, np.repeat(head, n_in)), (y, np.repeat(head, n_out))),
        tuple(labels for labels in (inner_in, inner_out) if labels is not None),
    )
    if n_in == 1 and n_out == 1:
        ctx.choose("", [whole])
        return y
    same = Alternative(
        "positions in every group",
        (*_across(x_rows, inner_in), *_across(y_rows, inner_out)),
        (head, *((x,) if n_in == 1 else ()), *((y,) if n_out == 1 else ())),
    )
    ctx.choose(f"has {groups} groups", [whole, same])
    return y


def _across(rows: Labels, inner: Labels | None) -> tuple[tuple[Labels, Labels], ...]:
    """Tie position j of every group together, and with entry j of the weight's own dim where it has one."""
    ties = [(rows[0], row) for row in rows[1:]]
    if inner is not None:
        ties.append((rows[0], inner))
    return tuple(ties)


def _space(ctx: OpContext, channel: int) -> list[Labels | None]:
    """Return the labels of the spatial dims; they pass only where a kernel of size 1 visits every position."""
    x, weight = ctx.arg("input"), ctx.arg("weight")
    n = weight.ndim - 2
    stride, kernel = _tuple(ctx.arg("stride", 1), n), weight.shape[2:]
    # For a kernel of size 1 both "same" and "valid" mean no padding.
    padding = _tuple(ctx.arg("padding", 0), n)
    space: list[Labels | None] = []
    for i, labels in enumerate(ctx.dims(x)[channel + 1 :]):
        point = kernel[i] == 1 and stride[i] == 1 and padding[i] in (0, "same", "valid")
        if not point:
            ctx.freeze(labels, "slides a kernel along this dim")
        space.append(labels if point else None)
    return space


def _tuple(value: object, n: int) -> tuple[object, ...]:
    if isinstance(value, (list, tuple)):
        return tuple(value) if len(value) == n else tuple(value) * n
    return (value,) * n
