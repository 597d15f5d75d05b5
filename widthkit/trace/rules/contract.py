"""Matrix products, all as one contraction over letters as in einsum; attention, recurrent layers, embeddings."""

from __future__ import annotations

import string
from collections.abc import Sequence

from torch import Tensor

from widthkit.trace.context import OpContext
from widthkit.trace.labels import Labels
from widthkit.trace.rules import rule
from widthkit.trace.rules.pointwise import broadcast_tie

LETTERS = string.ascii_letters


def contract(ctx: OpContext, operands: Sequence[tuple[Tensor, str]], count: bool = True) -> dict[str, Labels]:
    """Tie dims that share a letter and count the product of all letters as MACs.

    Args:
        ctx: The operator call.
        operands: Every tensor with one letter per dim.
        count: Whether to count MACs.

    Returns:
        Letter -> labels, for letters of labelled dims.
    """
    sizes: dict[str, int] = {}
    labels: dict[str, Labels] = {}
    order = sorted({letter for _, letters in operands for letter in letters})
    for letter in order:
        sides = [
            (ctx.dims(t)[i], t.shape[i]) for t, letters in operands for i, name in enumerate(letters) if name == letter
        ]
        sizes[letter] = max(size for _, size in sides)
        tied = ctx.match(*sides)
        if tied is not None:
            labels[letter] = tied
    if count:
        ctx.macs([(labels.get(letter), sizes[letter]) for letter in order])
    return labels


def _product(ctx: OpContext, a: Tensor, b: Tensor) -> tuple[tuple[Labels | None, ...], dict[str, Labels]]:
    """Contract two operands as ``torch.matmul`` does and return the labels of the result."""
    batch = LETTERS[: max(a.ndim, b.ndim, 2) - 2]
    left = "k" if a.ndim == 1 else "mk"
    right = "k" if b.ndim == 1 else "kn"
    # Batch dims get capital letters, which differ from m, k and n.
    left = (batch.upper()[-(a.ndim - 2) :] if a.ndim > 2 else "") + left
    right = (batch.upper()[-(b.ndim - 2) :] if b.ndim > 2 else "") + right
    out = batch.upper() + ("m" if a.ndim > 1 else "") + ("n" if b.ndim > 1 else "")
    labels = contract(ctx, [(a, left), (b, right)])
    return tuple(labels.get(letter) for letter in out), labels


@rule("matmul", "mm", "bmm", "mv", "dot", "__matmul__", "linalg_matmul")
def matmul(ctx: OpContext) -> None:
    """Tie the contracted dims and the batch dims."""
    a, b = ctx.tensors()[:2]
    ctx.set(ctx.out, _product(ctx, a, b)[0])


@rule("addmm", "baddbmm", "addbmm", "addmv")
def matmul_plus(ctx: OpContext) -> None:
    """Add a tensor that broadcasts to a matrix product."""
    extra, a, b = ctx.tensors()[:3]
    ctx.set(ctx.out, _product(ctx, a, b)[0])
    ctx.set(ctx.out, broadcast_tie(ctx, [ctx.out, extra], ctx.out))


@rule("linear")
def linear(ctx: OpContext) -> None:
    """Tie the last dim of the input with dim 1 of the weight; dim 0 of the weight is the result."""
    x, weight, bias = ctx.arg("input"), ctx.arg("weight"), ctx.arg("bias")
    rows = LETTERS[26 : 26 + x.ndim - 1]
    labels = contract(ctx, [(x, f"{rows}i"), (weight, "oi" if weight.ndim == 2 else "i")])
    result = labels.get("o")
    if bias is not None and bias.ndim:
        result = ctx.match((result, weight.shape[0]), (ctx.dims(bias)[0], len(bias)))
    ctx.attribute("in_features", labels.get("i"))
    ctx.attribute("out_features", result)
    tail = (result,) if weight.ndim == 2 else ()
    ctx.set(ctx.out, (*(labels.get(letter) for letter in rows), *tail))


@rule("einsum")
def einsum(ctx: OpContext) -> None:
    """Tie dims that share a letter; more than two operands count as one product of all letters."""
    equation, tensors = ctx.arg("equation").replace(" ", ""), ctx.tensors()
    left, _, right = equation.partition("->")
    if "..." in equation or (not right and "->" not in equation):
        for t in tensors:
            ctx.freeze_tensor(t, f"has an equation with implied dims ({equation})")
        return
    labels = contract(ctx, list(zip(tensors, left.split(","), strict=True)))
    ctx.set(ctx.out, tuple(labels.get(letter) for letter in right))


@rule("scaled_dot_product_attention")
def attention(ctx: OpContext) -> None:
    """Tie q with k along the head size, k with v along the tokens, and all three along the heads."""
    q, k, v = ctx.arg("query"), ctx.arg("key"), ctx.arg("value")
    batch = LETTERS[26 : 26 + q.ndim - 2]
    if k.ndim != q.ndim or v.ndim != q.ndim or not _broadcasts(q, k):
        # All query heads of a key would have to be dropped together with it.
        for t in (q, k, v):
            ctx.freeze_tensor(t, "shares keys between groups of query heads")
        ctx.macs([(None, n) for n in (*ctx.out.shape[:-1], k.shape[-2], q.shape[-1] + v.shape[-1])])
        return
    scores = contract(ctx, [(q, f"{batch}le"), (k, f"{batch}se")])
    values = contract(ctx, [(k, f"{batch}s_"), (v, f"{batch}sf")], count=False)
    sizes = dict(zip(f"{batch}lf", ctx.out.shape, strict=True)) | {"s": v.shape[-2]}
    labels = {**values, **scores}
    for letter, *n in zip(batch, q.shape, v.shape, strict=False):
        both = ctx.match((scores.get(letter), n[0]), (values.get(letter), n[1]))
        if both is not None:
            labels[letter] = both
    ctx.macs([(labels.get(letter), sizes[letter]) for letter in f"{batch}lsf"])
    mask = ctx.arg("attn_mask")
    if mask is not None:
        for back, letter in enumerate(reversed(f"{batch}ls"), start=1):
            if mask.ndim >= back:
                ctx.match((labels.get(letter), sizes[letter]), (ctx.dims(mask)[-back], mask.shape[-back]))
    ctx.set(ctx.out, tuple(labels.get(letter) for letter in f"{batch}lf"))


def _broadcasts(q: Tensor, k: Tensor) -> bool:
    """Whether every head has its own key, or all heads share one (multi-query attention)."""
    return all(n == m or 1 in (n, m) for m, n in zip(q.shape[:-2], k.shape[:-2], strict=True))


@rule("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def recurrent(ctx: OpContext) -> None:
    """Keep recurrent layers whole, and count every weight matrix once per token."""
    matrices = [t for t in ctx.arg("params", (ctx.arg("w_ih"), ctx.arg("w_hh"))) if t.ndim == 2]
    # Also right for a packed sequence, whose dims are tokens and features.
    x = ctx.arg("data", ctx.arg("input"))
    for t in ctx.tensors():
        ctx.freeze_tensor(t, "is kept whole")
    ctx.macs([(None, x.shape[:-1].numel()), (None, sum(t.numel() for t in matrices))])


@rule("embedding")
def embedding(ctx: OpContext) -> None:
    """Freeze the rows, which tokens look up; the columns are channels."""
    weight, indices = ctx.arg("weight"), ctx.arg("indices")
    rows, columns = ctx.dims(weight)
    ctx.freeze(rows, "looks rows up by index")
    ctx.attribute("embedding_dim", columns)
    ctx.set(ctx.out, (*ctx.dims(indices), columns))
