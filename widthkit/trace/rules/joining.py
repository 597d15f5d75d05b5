"""Joining and cutting: concatenate, stack, split, unbind, gate, pad."""

from __future__ import annotations

import numpy as np
import torch

from widthkit.trace.context import OpContext
from widthkit.trace.labels import CONSTANT, Labels
from widthkit.trace.rules import rule


@rule("cat", "concat", "concatenate")
def cat(ctx: OpContext) -> None:
    """Concatenate labels along one dim and tie the others."""
    parts = [t for t in ctx.tensors() if t.numel() or t.ndim > 1]
    axis = int(ctx.arg("dim", 0)) % ctx.out.ndim
    result: list[Labels | None] = []
    for d in range(ctx.out.ndim):
        if d != axis:
            result.append(ctx.match(*[(ctx.dims(t)[d], t.shape[d]) for t in parts]))
            continue
        sides = [ctx.dims(t)[d] for t in parts]
        if all(labels is None for labels in sides):
            result.append(None)
            continue
        joined = []
        for labels, t in zip(sides, parts, strict=True):
            if labels is None:
                labels = ctx.new(t.shape[d])
                ctx.freeze(labels, "concatenates a part of fixed size")
            joined.append(labels)
        result.append(np.concatenate(joined))
    ctx.set(ctx.out, tuple(result))


@rule("stack", "hstack", "vstack", "dstack", "column_stack")
def stack(ctx: OpContext) -> None:
    """Tie the stacked tensors; the new dim is fixed."""
    parts = ctx.tensors()
    if ctx.name != "stack":
        for t in parts:
            ctx.freeze_tensor(t, "stacks along a dim that depends on the shape")
        return
    dims = [ctx.match(*[(ctx.dims(t)[d], t.shape[d]) for t in parts]) for d in range(parts[0].ndim)]
    axis = int(ctx.arg("dim", 0)) % ctx.out.ndim
    ctx.set(ctx.out, (*dims[:axis], None, *dims[axis:]))


@rule("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes")
def split(ctx: OpContext) -> None:
    """Cut one dim. Parts of equal size must stay equal, so they are tied position by position."""
    x = ctx.tensors()[0]
    axis = int(ctx.arg("dim", 0)) % x.ndim
    dims, start = ctx.dims(x), 0
    labels = dims[axis]
    explicit = isinstance(ctx.arg("split_size", ctx.arg("split_sizes", ctx.arg("indices"))), (list, tuple))
    parts = ctx.outputs()
    sizes = {part.shape[axis] for part in parts}
    for part in parts:
        size = part.shape[axis]
        own = None if labels is None else labels[start : start + size]
        if own is not None and size == 1 and (explicit or len(sizes) > 1):
            ctx.freeze(own, "cuts a single position off this dim")
        if own is not None and not explicit:
            if len(sizes) > 1:
                ctx.freeze(own, "cuts this dim into unequal parts")
            elif start:
                assert labels is not None
                ctx.recording.store.tie(labels[:size], own)
        ctx.cut(labels, own)
        ctx.set(part, (*dims[:axis], own, *dims[axis + 1 :]))
        start += size


@rule("unbind")
def unbind(ctx: OpContext) -> None:
    """Return every position of a dim as a tensor: that dim is fixed, the others keep their labels."""
    x = ctx.tensors()[0]
    axis = int(ctx.arg("dim", 0)) % x.ndim
    dims = ctx.dims(x)
    ctx.freeze(dims[axis], "unbinds this dim")
    for part in ctx.outputs():
        ctx.set(part, (*dims[:axis], *dims[axis + 1 :]))


@rule("glu")
def glu(ctx: OpContext) -> None:
    """Multiply one half of a dim with the other: the halves are tied."""
    x = ctx.tensors()[0]
    axis = int(ctx.arg("dim", -1)) % x.ndim
    dims = ctx.dims(x)
    half = dims[axis]
    if half is not None:
        n = len(half) // 2
        ctx.recording.store.tie(half[:n], half[n:])
        half = half[:n]
    ctx.set(ctx.out, (*dims[:axis], half, *dims[axis + 1 :]))


@rule("pad", "constant_pad_nd")
def pad(ctx: OpContext) -> None:
    """Pad every dim on its own. New positions get the constant's label, or that of the position they repeat."""
    x, amounts = ctx.tensors()[0], list(ctx.arg("pad"))
    mode = ctx.arg("mode", "constant")
    result: list[Labels | None] = []
    for back, labels in zip(range(x.ndim - 1, -1, -1), ctx.dims(x), strict=True):
        before, after = amounts[2 * back : 2 * back + 2] or (0, 0)
        if labels is None or before == after == 0:
            result.append(labels)
        elif mode == "constant":
            inside = labels[max(-before, 0) : len(labels) - max(-after, 0)]
            result.append(np.pad(inside, (max(before, 0), max(after, 0)), constant_values=CONSTANT))
        else:
            where = torch.nn.functional.pad(torch.arange(len(labels)).double()[None], (before, after), mode=mode)
            result.append(labels[where[0].long().numpy()])
    ctx.set(ctx.out, tuple(result))


@rule("im2col")
def im2col(ctx: OpContext) -> None:
    """Flatten the window of every channel into positions of that channel."""
    x = ctx.tensors()[0]
    dims = ctx.dims(x)
    for labels in dims[-2:]:
        ctx.freeze(labels, "slides a window along this dim")
    channels = dims[-3]
    window = ctx.out.shape[-2] // x.shape[-3]
    ctx.set(ctx.out, (*dims[:-3], None if channels is None else np.repeat(channels, window), None))
