"""Pooling and resizing: labels of batch and channels pass, resized dims are frozen."""

from __future__ import annotations

import re

from widthkit.trace.context import OpContext
from widthkit.trace.labels import Labels
from widthkit.trace.rules import rule


@rule(
    *(f"{kind}{n}d" for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool") for n in (1, 2, 3)),
    *(f"{kind}{n}d" for kind in ("_adaptive_avg_pool", "mkldnn_max_pool", "fractional_max_pool") for n in (2, 3)),
    *(f"max_pool{n}d_with_indices" for n in (1, 2, 3)),
    *(f"max_unpool{n}d" for n in (2, 3)),
    *(f"upsample_nearest{n}d" for n in (1, 2, 3)),
    *(f"_upsample_nearest_exact{n}d" for n in (1, 2, 3)),
    *(f"{kind}{n}d" for kind in ("reflection_pad", "replication_pad") for n in (1, 2, 3)),
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_linear1d",
    "upsample_trilinear3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "_upsample_lanczos2d_aa",
)
def resize(ctx: OpContext) -> None:
    """Pass the labels of all dims before the spatial ones, and freeze those that are resized."""
    found = re.search(r"(\d)d", ctx.name)
    assert found is not None
    n = int(found.group(1))
    x = ctx.tensors()[0]
    dims = ctx.dims(x)
    space: list[Labels | None] = []
    for d in range(x.ndim - n, x.ndim):
        same = ctx.outputs()[0].shape[d] == x.shape[d] and ctx.name.startswith(("upsample", "_upsample"))
        if not same:
            ctx.freeze(dims[d], "resizes this dim")
        space.append(dims[d] if same else None)
    for out in ctx.outputs():
        ctx.set(out, (*dims[: x.ndim - n], *space))


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sample(ctx: OpContext) -> None:
    """Pass the labels of the input's batch and channels; the grid holds coordinates."""
    x, grid = ctx.tensors()[:2]
    dims = ctx.dims(x)
    for labels in (*dims[2:], *ctx.dims(grid)[1:]):
        ctx.freeze(labels, "samples this dim by coordinates")
    ctx.set(ctx.out, (dims[0], dims[1], *(None,) * (ctx.out.ndim - 2)))


@rule("roi_align", "roi_pool")
def regions(ctx: OpContext) -> None:
    """Pass the channels of feature maps; freeze the boxes and the dims that they cut."""
    x, boxes = ctx.tensors()[:2]
    batch, channels, *space = ctx.dims(x)
    for labels in (batch, *space):
        ctx.freeze(labels, "is cut into regions")
    ctx.freeze_tensor(boxes, "says which regions to cut")
    for out in ctx.outputs():
        ctx.set(out, (None, channels, *(None,) * (out.ndim - 2)))
