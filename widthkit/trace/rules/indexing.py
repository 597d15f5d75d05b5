"""Indexing: slices, rolls, flips and lookups.

These operators are executed, as they are, on a tensor of labels, and the labels of the result are read off. So
``roll``, ``flip``, ``unfold`` and the like are exact without a rule of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from widthkit.trace.context import OpContext, flat_tensors
from widthkit.trace.labels import Labels
from widthkit.trace.rules import rule
from widthkit.trace.rules.views import positional, split_grid


@rule("index")
def index(ctx: OpContext) -> None:
    """Pick positions by integer tensors. Where their values are known the labels are picked too, else the dim freezes.

    Values are known in meta runs only, where index tensors may be real. With fake values they mean nothing.
    """
    x, indices = ctx.arg("self"), ctx.arg("indices")
    dims = ctx.dims(x)
    if all(labels is None for labels in dims):
        return
    values_known = x.device.type == "meta" and all(i is None or i.device.type != "meta" for i in indices)
    if values_known and ctx.out.numel():
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
"""Operators that change one dim only, even where nothing is left of it (``x[:, :0]``)."""


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
    """Execute the operator on the labels, one labelled dim at a time."""
    x = ctx.tensors()[0]
    dims = ctx.dims(x)
    if any(t.device.type == "meta" for t in ctx.tensors()[1:]):
        ctx.freeze_tensor(x, "is indexed by values that are unknown on the meta device")
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
                # For example a detector that finds nothing in the image: no label of the dim is left.
                ctx.freeze(labels, "reaches an operator that picks nothing from the example input")
                continue
            if ctx.name == "slice" and int(ctx.arg("step", 1)) != 1:
                ctx.freeze(labels, "picks every n-th position of this dim")
            if (grid == grid.flat[0]).all() and (labels != labels[0]).any():
                ctx.freeze(grid.flat[:1], "picks one position of this dim")
            for e, moved in enumerate(split_grid(ctx, grid)):
                if moved is not None and found[e] is not None:
                    ctx.freeze(moved, "merges two channel dims")
                    ctx.freeze(found[e], "merges two channel dims")
                found[e] = moved if found[e] is None else found[e]
                ctx.cut(labels, found[e])
    for found, out in zip(results, ctx.outputs(), strict=True):
        ctx.set(out, tuple(found))


def _run_on_labels(ctx: OpContext, labels: Labels, d: int, shape: tuple[int, ...]) -> list[Labels]:
    """Run the operator on a tensor that holds the labels of one dim and is broadcast along the others."""
    column = [1] * len(shape)
    column[d] = shape[d]
    carrier: Tensor = torch.from_numpy(labels.copy()).reshape(column).expand(shape)
    rest = [value for _, value in positional(ctx)]
    return [out.long().numpy() for out in flat_tensors((ctx.func(carrier, *rest),))]
