"""Random networks out of nested blocks.

A recipe is nested tuples of kinds and sizes. It holds no channel counts, so every recipe can be built; hypothesis can
therefore make a failing one smaller.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.fuzz import leaves, tokens
from benchmarks.fuzz.leaves import Leaf

Recipe = tuple[str, tuple[Any, ...]]
MAX_CHANNELS = 16
LEAVES: dict[str, Callable[[int, int], Leaf]] = {
    **{k: functools.partial(leaves.Conv, kind=k) for k in ("conv", "dilated", "depthwise", "grouped")},
    "transposed": leaves.Transposed,
    "se": leaves.Squeeze,
    "shared": leaves.Shared,
    "dead": leaves.Dead,
    "prelu": leaves.Slopes,
    "cat_self": leaves.Twice,
    "slice": leaves.Slice,
    "standardised": leaves.Standardised,
    "pixels": leaves.Shuffled,
    "cut": leaves.Cut,
    "written": leaves.Written,
    "asking": leaves.Asking,
    "attention": functools.partial(tokens.Heads, computed=True),
    "heads": functools.partial(tokens.Heads, computed=False),
    "mlp": tokens.Perceptron,
    "group_norm": tokens.Grouped,
    "glu": tokens.Gated,
    "einsum": tokens.Named,
}
NESTS = ("residual", "concat", "split", "shuffle", "chain", "gate", "sizes")


class Nest(nn.Module):
    """Blocks inside a block.

    Args:
        kind: How their results are combined.
        i: Channels that come in.
        inner: Their recipes.
    """

    def __init__(self, kind: str, i: int, inner: Sequence[Recipe]) -> None:
        super().__init__()
        self.kind = "residual" if kind in ("split", "shuffle") and i % 2 else kind
        self.fit: nn.Module = nn.Identity()
        self.out = i
        self.sizes = [i // 2, i - i // 2]
        if self.kind == "concat":
            self.blocks: nn.Module = nn.ModuleList(make(i, recipe) for recipe in inner)
            wide = sum(int(b.out) for b in self.blocks.children()) + i  # type: ignore[arg-type, misc]
            self.out = min(wide, MAX_CHANNELS)
            self.fit = nn.Conv2d(wide, self.out, 1) if wide > self.out else self.fit
        elif self.kind in ("split", "shuffle", "sizes"):
            part = self.sizes[1]
            self.blocks = chain(part, inner)
            wide = width(self.blocks, part)
            self.fit = nn.Conv2d(wide, part, 1) if wide != part else self.fit
        else:
            self.blocks = chain(i, inner)
            wide = width(self.blocks, i)
            if self.kind == "chain":
                self.out = wide
            elif wide != i:
                self.fit = nn.Conv2d(wide, i, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks and combine their results."""
        if self.kind == "concat":
            return self.fit(torch.cat([x, *(b(x) for b in self.blocks.children())], 1))  # type: ignore[no-any-return]
        if self.kind in ("split", "shuffle", "sizes"):
            left, right = x.split(self.sizes, 1) if self.kind == "sizes" else x.chunk(2, 1)
            x = torch.cat([left, self.fit(self.blocks(right))], 1)
            return _shuffled(x) if self.kind == "shuffle" else x
        y: Tensor = self.fit(self.blocks(x))
        if self.kind == "gate":
            return x * y.sigmoid()
        return x + y if self.kind == "residual" else y


def _shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def make(i: int, recipe: Recipe) -> Leaf | Nest:
    """Build the block of a recipe for ``i`` channels."""
    kind, inside = recipe
    return LEAVES[kind](i, inside[0]) if kind in LEAVES else Nest(kind, i, inside)


def chain(i: int, inner: Sequence[Recipe]) -> nn.Sequential:
    """Build blocks that follow one another."""
    blocks: list[nn.Module] = []
    for recipe in inner:
        block = make(i, recipe)
        blocks.append(block)
        i = block.out
    return nn.Sequential(*blocks)


def width(blocks: nn.Module, i: int) -> int:
    """Return the output channels of a chain with ``i`` input channels."""
    last = list(blocks.children())
    return int(last[-1].out) if last else i  # type: ignore[arg-type, misc]


class RandomNet(nn.Module):
    """Stem, random blocks, and a head that reads averages or the flattened map."""

    def __init__(self, inner: Sequence[Recipe], flat: bool = False) -> None:
        super().__init__()
        self.stem, self.norm, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), chain(8, inner)
        self.flat = flat
        self.head = nn.Linear(width(self.body, 8) * (9 if flat else 1), 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(N, 4)`` for images ``(N, 3, 6, 6)``."""
        x = self.body(F.relu(self.norm(self.stem(x))))
        return self.head(F.avg_pool2d(x, 2).flatten(1) if self.flat else x.mean((2, 3)))  # type: ignore[no-any-return]
