"""Reductions drop dims and let the others pass."""

from __future__ import annotations

from widthkit.trace.context import OpContext
from widthkit.trace.labels import Labels
from widthkit.trace.rules import rule

_INDEX = {"argmax", "argmin", "sort", "argsort", "topk", "cumsum", "cumprod", "median", "kthvalue", "mode", "unique"}


@rule(
    "mean",
    "sum",
    "nansum",
    "nanmean",
    "prod",
    "amax",
    "amin",
    "aminmax",
    "max",
    "min",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "norm",
    "linalg_vector_norm",
    "linalg_norm",
    "frobenius_norm",
    "logsumexp",
    "any",
    "all",
    "argmax",
    "argmin",
    "median",
    "count_nonzero",
)
def reduction(ctx: OpContext) -> None:
    """Drop the reduced dims; an index into channels is no channel, so argmax along channels freezes them."""
    x = ctx.tensors()[0]
    if ctx.arg("other") is not None and len(ctx.tensors()) > 1:
        from widthkit.trace.rules.pointwise import pointwise

        pointwise(ctx)
        return
    dim = ctx.arg("dim")
    if dim is None or dim == []:
        reduced = set(range(x.ndim))
    else:
        reduced = {d % x.ndim for d in (dim if isinstance(dim, (list, tuple)) else [dim])}
    dims = ctx.dims(x)
    if ctx.name in _INDEX:
        for d in reduced:
            ctx.freeze(dims[d], "returns positions along this dim")
    keep = bool(ctx.arg("keepdim", False))
    left: list[Labels | None] = []
    for d, labels in enumerate(dims):
        if d not in reduced:
            left.append(labels)
        elif keep:
            left.append(None)
    for out in ctx.outputs():
        ctx.set(out, tuple(left))


@rule("cumsum", "cumprod", "sort", "argsort", "topk", "kthvalue", "cummax", "cummin", "logcumsumexp")
def ordered(ctx: OpContext) -> None:
    """Operators that depend on the order along a dim freeze it."""
    x = ctx.tensors()[0]
    dims = list(ctx.dims(x))
    d = int(ctx.arg("dim", -1)) % max(x.ndim, 1)
    ctx.freeze(dims[d], "depends on the order along this dim")
    dims[d] = None
    for out in ctx.outputs():
        if out.ndim == x.ndim:
            ctx.set(out, tuple(dims))
