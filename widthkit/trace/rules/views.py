"""Views: labels move exactly as the data does.

Reshapes are solved block by block. Permutations and shuffles follow from the dims that they reorder.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from widthkit.trace.context import OpContext
from widthkit.trace.labels import Alternative, Dims, Labels
from widthkit.trace.rules import rule


@rule(
    "view",
    "reshape",
    "_unsafe_view",
    "_reshape_alias",
    "view_as",
    "reshape_as",
    "flatten",
    "unflatten",
    "ravel",
    "squeeze",
    "unsqueeze",
    "atleast_1d",
    "atleast_2d",
    "atleast_3d",
    "expand_dims",
)
def reshape(ctx: OpContext) -> None:
    """Regroup dims as the result's shape says."""
    x = ctx.tensors()[0]
    ctx.set(ctx.out, regroup(ctx, ctx.dims(x), tuple(x.shape), tuple(ctx.out.shape)))


_EMPTY_SIZE = 1_000_003
"""Replaces the size 0 of an empty batch; a prime that no size of a model has."""


def blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split a reshape into the smallest blocks ``(dims before, dims after)`` of equal products; size 1 is left out.

    >>> blocks((2, 8, 7, 7), (2, 392))
    [([0], [0]), ([1, 2, 3], [1])]
    """
    left = [d for d, n in enumerate(before) if n != 1]
    right = [d for d, n in enumerate(after) if n != 1]
    found = []
    i = j = 0
    while i < len(left):
        a, b = [left[i]], [right[j]]
        n, m = before[left[i]], after[right[j]]
        i, j = i + 1, j + 1
        while n != m:
            if n < m:
                a.append(left[i])
                n *= before[left[i]]
                i += 1
            else:
                b.append(right[j])
                m *= after[right[j]]
                j += 1
        found.append((a, b))
    return found


def regroup(ctx: OpContext, dims: Dims, before: tuple[int, ...], after: tuple[int, ...]) -> Dims:
    """Return the labels of a reshaped tensor."""
    result: list[Labels | None] = [None] * len(after)
    if 0 in before:
        # An empty batch, such as a detector without detections. Its dim is followed as if it had many entries.
        if before.count(0) != 1 or after.count(0) != 1:
            return tuple(result)
        before = tuple(n or _EMPTY_SIZE for n in before)
        after = tuple(n or _EMPTY_SIZE for n in after)
    for a, b in blocks(before, after):
        if len(a) == 1 and len(b) == 1:
            result[b[0]] = dims[a[0]]
        elif any(dims[d] is not None for d in a):
            flat = _merge(ctx, [dims[d] for d in a], [before[d] for d in a])
            for d, labels in zip(b, split_grid(ctx, flat.reshape([after[d] for d in b])), strict=True):
                result[d] = labels
    return tuple(result)


def _merge(ctx: OpContext, parts: list[Labels | None], sizes: list[int]) -> Labels:
    """Merge dims into one. The labels of a single labelled dim repeat; of several labelled dims one can stay free."""
    grids = []
    for axis, labels in enumerate(parts):
        if labels is not None:
            shape = [1] * len(sizes)
            shape[axis] = sizes[axis]
            grids.append(np.broadcast_to(labels.reshape(shape), sizes).reshape(-1))
    if len(grids) == 1:
        return grids[0]
    merged = ctx.new(len(grids[0]))
    labelled = [labels for labels in parts if labels is not None]
    ctx.choose(
        f"merges {len(grids)} channel dims",
        [
            Alternative(
                f"dim of size {len(labels)}",
                ((merged, grid),),
                tuple(other for other in labelled if other is not labels),
            )
            for labels, grid in zip(labelled, grids, strict=True)
        ],
    )
    return merged


def split_grid(ctx: OpContext, grid: Labels) -> list[Labels | None]:
    """Return labels for every axis of a label grid.

    A grid that varies along one axis is labelled there. Where it varies along several, one factor can stay free and the
    others are kept whole: what remains after shrinking must be a full rectangle again.
    """
    result: list[Labels | None] = [None] * grid.ndim
    if not grid.size:
        return result
    varying = [axis for axis in range(grid.ndim) if (grid != grid.take([0], axis=axis)).any()]
    grid = grid[tuple(slice(None) if axis in varying else slice(1) for axis in range(grid.ndim))]
    if len(varying) == 1:
        axis = varying[0]
        result[axis] = np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1)[:, 0]
    elif varying:
        fresh = {axis: ctx.new(grid.shape[axis]) for axis in varying}
        alternatives = []
        for axis in sorted(varying, key=lambda a: -a):
            shape = [1] * grid.ndim
            shape[axis] = grid.shape[axis]
            own = np.broadcast_to(fresh[axis].reshape(shape), grid.shape).reshape(-1)
            others = tuple(fresh[a] for a in varying if a != axis)
            alternatives.append(Alternative(f"factor {grid.shape[axis]}", ((grid.reshape(-1), own),), others))
        sizes = " x ".join(str(grid.shape[a]) for a in varying)
        ctx.choose(f"splits channels into {sizes}", alternatives)
        for axis, labels in fresh.items():
            result[axis] = labels
    return result


@rule("permute", "transpose", "t", "movedim", "moveaxis", "swapaxes", "swapdims", "numpy_T", "mT", "adjoint", "select")
def permute(ctx: OpContext) -> None:
    """Reorder or drop dims. The operator runs on a tensor whose strides number its dims."""
    x = ctx.tensors()[0]
    numbers = tuple(range(1, x.ndim + 1))
    numbered = torch.empty_strided(tuple(x.shape), numbers, device="meta")
    moved = ctx.func(numbered, *(value for _, value in positional(ctx)))
    dims = ctx.dims(x)
    if ctx.name == "select":
        ctx.freeze(dims[int(ctx.arg("dim")) % x.ndim], "picks one position of this dim")
    ctx.set(ctx.out, tuple(dims[stride - 1] for stride in moved.stride()))


def positional(ctx: OpContext) -> list[tuple[str, object]]:
    """Return names and values of the positional arguments after the first, in the order of the schema."""
    return [(a.name, ctx.arg(a.name)) for a in ctx.func._schema.arguments[1:] if not a.kwarg_only]


@rule("expand", "expand_as", "broadcast_to")
def expand(ctx: OpContext) -> None:
    """Repeat dims of size 1."""
    x = ctx.tensors()[0]
    ctx.set(ctx.out, _expanded(ctx, x, ctx.out))


@rule("broadcast_tensors", "meshgrid")
def broadcast_tensors(ctx: OpContext) -> None:
    """Expand several tensors to one shape."""
    for x, out in zip(ctx.tensors(), ctx.outputs(), strict=True):
        ctx.set(out, _expanded(ctx, x, out))


def _expanded(ctx: OpContext, x: Tensor, out: Tensor) -> Dims:
    """Keep the labels of dims that keep their size; repeated dims get new labels and so follow what they meet."""
    lead = out.ndim - x.ndim
    result: list[Labels | None] = []
    for d, size in enumerate(out.shape):
        before = x.shape[d - lead] if d >= lead else 1
        if before == size:
            result.append(ctx.dims(x)[d - lead] if d >= lead else None)
        else:
            result.append(ctx.new(size))
    return tuple(result)


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def shuffle(ctx: OpContext) -> None:
    """Treat a shuffle as view, permute, view."""
    x = ctx.tensors()[0]
    *lead, c, h, w = x.shape
    n = len(lead)
    middle: tuple[int, ...]
    order: tuple[int, ...]
    if ctx.name == "pixel_shuffle":
        r = int(ctx.arg("upscale_factor"))
        middle, order = (*lead, c // (r * r), r, r, h, w), (n, n + 3, n + 1, n + 4, n + 2)
    elif ctx.name == "pixel_unshuffle":
        r = int(ctx.arg("downscale_factor"))
        middle, order = (*lead, c, h // r, r, w // r, r), (n, n + 2, n + 4, n + 1, n + 3)
    else:
        g = int(ctx.arg("groups"))
        middle, order = (*lead, g, c // g, h, w), (n + 1, n, n + 2, n + 3)
    dims = regroup(ctx, ctx.dims(x), tuple(x.shape), tuple(middle))
    perm = (*range(n), *order)
    moved = tuple(dims[p] for p in perm)
    ctx.set(ctx.out, regroup(ctx, moved, tuple(middle[p] for p in perm), tuple(ctx.out.shape)))
