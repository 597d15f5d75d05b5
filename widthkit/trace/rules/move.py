"""Data movement: labels move exactly as the data does.

Regrouping views are solved block by block; every other operator is executed, as it is, on a tensor of labels, and
the labels of the result are read off. No rule per operator is needed, so ``roll``, ``flip``, ``unfold`` and the like
are exact by construction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from widthkit.trace.context import OpContext, flat_tensors
from widthkit.trace.labels import CONSTANT, Alternative, Dims, Labels
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
    """Regroup dims; the result's shape says how."""
    x = ctx.tensors()[0]
    ctx.set(ctx.out, regroup(ctx, ctx.dims(x), tuple(x.shape), tuple(ctx.out.shape)))


_MANY = 1_000_003
"""A prime that no size of a model has."""


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
        # An empty batch, such as no detections at all: its dim is followed as if it had many entries.
        if before.count(0) != 1 or after.count(0) != 1:
            return tuple(result)
        before = tuple(n or _MANY for n in before)
        after = tuple(n or _MANY for n in after)
    for a, b in blocks(before, after):
        if len(a) == 1 and len(b) == 1:
            result[b[0]] = dims[a[0]]
        elif any(dims[d] is not None for d in a):
            flat = _merge(ctx, [dims[d] for d in a], [before[d] for d in a])
            for d, labels in zip(b, _split(ctx, flat.reshape([after[d] for d in b])), strict=True):
                result[d] = labels
    return tuple(result)


def _merge(ctx: OpContext, parts: list[Labels | None], sizes: list[int]) -> Labels:
    """Merge dims into one: with one labelled dim its labels repeat, with several one of them stays free."""
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


def _split(ctx: OpContext, grid: Labels) -> list[Labels | None]:
    """Give every axis of a label grid labels of its own.

    A grid that varies along one axis is labelled there. Along several axes, one factor stays free and the others
    are kept whole, because what remains must again be a full rectangle.
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
    """Reorder or drop dims: run the operator on strides that name the dims."""
    x = ctx.tensors()[0]
    names = tuple(range(1, x.ndim + 1))
    probe = torch.empty_strided(tuple(x.shape), names, device="meta")
    moved = ctx.func(probe, *(value for _, value in _rest(ctx)))
    dims = ctx.dims(x)
    if ctx.name == "select":
        ctx.freeze(dims[int(ctx.arg("dim")) % x.ndim], "picks one position of this dim")
    ctx.set(ctx.out, tuple(dims[stride - 1] for stride in moved.stride()))


def _rest(ctx: OpContext) -> list[tuple[str, object]]:
    """Names and values of the positional arguments after the first, in the order of the schema."""
    return [(a.name, ctx.arg(a.name)) for a in ctx.func._schema.arguments[1:] if not a.kwarg_only]


@rule("expand", "expand_as", "broadcast_to")
def expand(ctx: OpContext) -> None:
    """Repeat single positions; see :func:`_expanded`."""
    x = ctx.tensors()[0]
    ctx.set(ctx.out, _expanded(ctx, x, ctx.out))


@rule("broadcast_tensors", "meshgrid")
def broadcast_tensors(ctx: OpContext) -> None:
    """Expand several tensors to one shape."""
    for x, out in zip(ctx.tensors(), ctx.outputs(), strict=True):
        ctx.set(out, _expanded(ctx, x, out))


def _expanded(ctx: OpContext, x: Tensor, out: Tensor) -> Dims:
    """Keep the labels of dims that keep their size; what is repeated is as wide as whatever it will meet."""
    lead = out.ndim - x.ndim
    result: list[Labels | None] = []
    for d, size in enumerate(out.shape):
        before = x.shape[d - lead] if d >= lead else 1
        if before == size:
            result.append(ctx.dims(x)[d - lead] if d >= lead else None)
        else:
            result.append(ctx.new(size))
    return tuple(result)


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
        pieces = []
        for labels, t in zip(sides, parts, strict=True):
            if labels is None:
                labels = ctx.new(t.shape[d])
                ctx.freeze(labels, "concatenates a part of fixed size")
            pieces.append(labels)
        result.append(np.concatenate(pieces))
    ctx.set(ctx.out, tuple(result))


@rule("stack", "hstack", "vstack", "dstack", "column_stack")
def stack(ctx: OpContext) -> None:
    """Tie what is stacked; the new dim is fixed."""
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
    """Cut one dim. Equal parts must stay equal, so they are tied position by position."""
    x = ctx.tensors()[0]
    axis = int(ctx.arg("dim", 0)) % x.ndim
    dims, start = ctx.dims(x), 0
    labels = dims[axis]
    explicit = isinstance(ctx.arg("split_size", ctx.arg("split_sizes", ctx.arg("indices"))), (list, tuple))
    pieces = ctx.outputs()
    sizes = {p.shape[axis] for p in pieces}
    for piece in pieces:
        part = None if labels is None else labels[start : start + piece.shape[axis]]
        if part is not None and len(part) == 1 and (explicit or len(sizes) > 1):
            ctx.freeze(part, "takes one position of this dim apart")
        if part is not None and not explicit:
            if len(sizes) > 1:
                ctx.freeze(part, "cuts this dim into unequal parts")
            elif start:
                assert labels is not None
                ctx.run.store.tie(labels[: len(part)], part)
        ctx.set(piece, (*dims[:axis], part, *dims[axis + 1 :]))
        start += piece.shape[axis]


@rule("unbind")
def unbind(ctx: OpContext) -> None:
    """Take every position of a dim apart: that dim is fixed, the others are shared."""
    x = ctx.tensors()[0]
    axis = int(ctx.arg("dim", 0)) % x.ndim
    dims = ctx.dims(x)
    ctx.freeze(dims[axis], "takes this dim apart")
    for piece in ctx.outputs():
        ctx.set(piece, (*dims[:axis], *dims[axis + 1 :]))


@rule("glu")
def glu(ctx: OpContext) -> None:
    """Gate one half of a dim with the other: the halves are tied."""
    x = ctx.tensors()[0]
    axis = int(ctx.arg("dim", -1)) % x.ndim
    dims = ctx.dims(x)
    half = dims[axis]
    if half is not None:
        n = len(half) // 2
        ctx.run.store.tie(half[:n], half[n:])
        half = half[:n]
    ctx.set(ctx.out, (*dims[:axis], half, *dims[axis + 1 :]))


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def shuffle(ctx: OpContext) -> None:
    """Spell a shuffle as view, permute, view, which is what it is."""
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


@rule("index")
def index(ctx: OpContext) -> None:
    """Pick positions by integer tensors. Where their values are known the labels are picked too, else the dim stays.

    In a hollow run all values are there, but they mean nothing.
    """
    x, indices = ctx.arg("self"), ctx.arg("indices")
    dims = ctx.dims(x)
    if all(labels is None for labels in dims):
        return
    known = x.device.type == "meta" and all(i is None or i.device.type != "meta" for i in indices)
    if known and ctx.out.numel():
        execute(ctx)
        return
    picked = [d for d, i in enumerate(indices) if i is not None]
    for d in picked:
        ctx.freeze(dims[d], "is indexed by positions")
    n_new = ctx.out.ndim - (x.ndim - len(picked))
    rest = [labels for d, labels in enumerate(dims) if d not in picked]
    together = picked == list(range(picked[0], picked[-1] + 1)) if picked else True
    at = picked[0] if picked and together else 0
    masks = any(i is not None and i.dtype == torch.bool and i.ndim > 1 for i in indices)
    if masks or len(rest) + n_new != ctx.out.ndim:
        for labels in dims:
            ctx.freeze(labels, "is indexed by a mask")
        return
    ctx.set(ctx.out, (*rest[:at], *(None,) * n_new, *rest[at:]))


_ALONG_ONE_DIM = ("slice", "narrow", "narrow_copy", "index_select", "repeat_interleave")
"""They leave the other dims as they are, also where nothing is left (``x[:, :0]``)."""


@rule(
    *_ALONG_ONE_DIM,
    "roll",
    "flip",
    "rot90",
    "repeat",
    "tile",
    "unfold",
    "diagonal",
    "tril",
    "triu",
    "take_along_dim",
)
def execute(ctx: OpContext) -> None:
    """Execute the operator on the labels themselves, one labelled dim at a time."""
    x = ctx.tensors()[0]
    dims = ctx.dims(x)
    if any(t.device.type == "meta" for t in ctx.tensors()[1:]):
        ctx.freeze_tensor(x, "is indexed by values that the trace does not know")
        return
    results: list[list[Labels | None]] = [[None] * out.ndim for out in ctx.outputs()]
    dim = ctx.arg("dim") if ctx.name in _ALONG_ONE_DIM else None
    for d, labels in enumerate(dims):
        if labels is None:
            continue
        if dim is not None and dim % x.ndim != d:
            results[0][d] = labels
            continue
        shape = tuple(x.shape) if dim is None else tuple(n if e == d else 1 for e, n in enumerate(x.shape))
        for found, grid in zip(results, _run_on_labels(ctx, labels, d, shape), strict=True):
            if not grid.size:
                # As where a detector finds nothing in the example image: no label is left to say what came through.
                ctx.freeze(labels, "reaches an operator that picks nothing from the example input")
                continue
            if (grid == grid.flat[0]).all() and (labels != labels[0]).any():
                ctx.freeze(grid.flat[:1], "picks one position of this dim")
            for e, moved in enumerate(_split(ctx, grid)):
                if moved is not None and found[e] is not None:
                    ctx.freeze(moved, "merges two channel dims")
                    ctx.freeze(found[e], "merges two channel dims")
                found[e] = moved if found[e] is None else found[e]
    for found, out in zip(results, ctx.outputs(), strict=True):
        ctx.set(out, tuple(found))


def _run_on_labels(ctx: OpContext, labels: Labels, d: int, shape: tuple[int, ...]) -> list[Labels]:
    """Run the operator on a tensor that holds the labels of one dim and is broadcast along the others."""
    column = [1] * len(shape)
    column[d] = shape[d]
    carrier: Tensor = torch.from_numpy(labels.copy()).reshape(column).expand(shape)
    rest = [value for _, value in _rest(ctx)]
    return [out.long().numpy() for out in flat_tensors((ctx.func(carrier, *rest),))]


@rule("pad", "constant_pad_nd")
def pad(ctx: OpContext) -> None:
    """Pad every dim for itself: zeros beside an image say nothing about its channels, zeros beside channels do."""
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
    """Lay the window of every channel out behind it."""
    x = ctx.tensors()[0]
    dims = ctx.dims(x)
    for labels in dims[-2:]:
        ctx.freeze(labels, "slides a window along this dim")
    channels = dims[-3]
    window = ctx.out.shape[-2] // x.shape[-3]
    ctx.set(ctx.out, (*dims[:-3], None if channels is None else np.repeat(channels, window), None))
