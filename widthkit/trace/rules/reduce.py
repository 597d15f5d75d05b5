"""Reductions drop dims and pass the labels of the others."""

from __future__ import annotations

from widthkit.trace.context import OpContext
from widthkit.trace.labels import Labels
from widthkit.trace.rules import rule
from widthkit.trace.rules.pointwise import pointwise

_RETURN_INDICES = {"argmax", "argmin", "median"}


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
    """Drop the reduced dims. Operators such as argmax return indices into a dim, which freezes it."""
    x = ctx.tensors()[0]
    if ctx.arg("other") is not None and len(ctx.tensors()) > 1:
        pointwise(ctx)
        return
    dim = ctx.arg("dim")
    if dim is None or dim == []:
        reduced = set(range(x.ndim))
    else:
        reduced = {d % x.ndim for d in (dim if isinstance(dim, (list, tuple)) else [dim])}
    dims = ctx.dims(x)
    if ctx.name in _RETURN_INDICES:
        for d in reduced:
            ctx.freeze(dims[d], "returns positions along this dim")
    keep = bool(ctx.arg("keepdim", False))
    kept: list[Labels | None] = []
    for d, labels in enumerate(dims):
        if d not in reduced:
            kept.append(labels)
        elif keep:
            kept.append(None)
    for out in ctx.outputs():
        ctx.set(out, tuple(kept))


@rule("cumsum", "cumprod", "sort", "argsort", "topk", "kthvalue", "cummax", "cummin", "logcumsumexp")
def ordered(ctx: OpContext) -> None:
    """Freeze the dim along whose order the result depends."""
    x = ctx.tensors()[0]
    dims = list(ctx.dims(x))
    d = int(ctx.arg("dim", -1)) % max(x.ndim, 1)
    ctx.freeze(dims[d], "depends on the order along this dim")
    dims[d] = None
    for out in ctx.outputs():
        if out.ndim == x.ndim:
            ctx.set(out, tuple(dims))
