"""Random networks out of nested blocks, for fuzzing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

KINDS = ("conv", "dilated", "depthwise", "grouped", "transposed", "se", "shared", "dead", "prelu", "cat_self", "slice")
NESTING = ("residual", "concat", "split", "shuffle", "chain", "gate")
MAX_CHANNELS = 16
Recipe = tuple[str, tuple[Any, ...]]


def recipes() -> st.SearchStrategy[list[Recipe]]:
    """Lists of blocks, nested; a recipe knows no channel counts, so every one can be built."""
    leaf = st.tuples(st.sampled_from(KINDS), st.tuples(st.integers(1, 6)))
    tree = st.recursive(
        leaf,
        lambda inner: st.tuples(st.sampled_from(NESTING), st.lists(inner, min_size=1, max_size=3).map(tuple)),
        max_leaves=6,
    )
    return st.lists(tree, min_size=1, max_size=4)


class Leaf(nn.Module):
    """A block without blocks inside; ``width`` is what it makes, 2 per size."""

    def __init__(self, kind: str, i: int, size: int) -> None:
        super().__init__()
        o = self.out = 2 * size
        self.kind, self.k = kind, i // 2
        if kind in ("conv", "dead", "slice"):
            self.conv = nn.Conv2d(i - self.k if kind == "slice" else i, o, 3, padding=1)
        elif kind == "dilated":
            self.conv = nn.Conv2d(i, o, 3, padding=2, dilation=2)
        elif kind == "depthwise":
            self.conv, self.out = nn.Conv2d(i, i, 3, padding=1, groups=i), i
        elif kind == "grouped":
            self.conv = nn.Conv2d(i, o, 3, padding=1, groups=2 if i % 2 == 0 else 1)
        elif kind == "transposed":
            self.conv = nn.ConvTranspose2d(i, o, 3, padding=1)
        elif kind == "se":
            self.down, self.up, self.out = nn.Linear(i, size), nn.Linear(size, i), i
        elif kind == "shared":
            self.first, self.conv = nn.Conv2d(i, o, 1), nn.Conv2d(o, o, 3, padding=1)
        elif kind == "prelu":
            self.act, self.out = nn.PReLU(i), i
        elif kind == "cat_self":
            self.conv = nn.Conv2d(2 * i, o, 1)
        self.norm = nn.BatchNorm2d(self.out)
        self.unused = nn.Conv2d(3, 5, 1) if kind == "dead" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "se":
            gate = self.up(F.relu(self.down(x.mean((2, 3)))))
            x = x * gate.sigmoid()[:, :, None, None]
        elif self.kind == "shared":
            x = self.conv(self.conv(self.first(x)).relu())
        elif self.kind == "prelu":
            x = self.act(x)
        elif self.kind == "slice":
            x = self.conv(x[:, self.k :])
        else:
            if self.kind == "dead":
                F.relu(x)
            x = self.conv(torch.cat([x, x], 1) if self.kind == "cat_self" else x)
        return F.relu(self.norm(x))


class Nest(nn.Module):
    """Blocks inside a block."""

    def __init__(self, kind: str, i: int, inner: tuple[Recipe, ...]) -> None:
        super().__init__()
        self.kind = "residual" if kind in ("split", "shuffle") and i % 2 else kind
        self.fit = nn.Identity()
        if self.kind in ("residual", "gate", "chain"):
            self.blocks = chain(i, inner)
            self.out = width(self.blocks, i)
            if self.out != i and self.kind != "chain":
                self.fit = nn.Conv2d(self.out, i, 1)
                self.out = i
        elif self.kind == "concat":
            self.blocks = nn.ModuleList(make(i, recipe) for recipe in inner)
            wide = sum(b.out for b in self.blocks) + i
            self.out = min(wide, MAX_CHANNELS)
            self.fit = nn.Conv2d(wide, self.out, 1) if wide > self.out else self.fit
        else:
            self.blocks = chain(i // 2, inner)
            wide = width(self.blocks, i // 2)
            self.fit, self.out = nn.Conv2d(wide, i // 2, 1) if wide != i // 2 else self.fit, i

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "concat":
            return self.fit(torch.cat([x, *(block(x) for block in self.blocks)], 1))
        if self.kind in ("split", "shuffle"):
            left, right = x.chunk(2, 1)
            x = torch.cat([left, self.fit(self.blocks(right))], 1)
            if self.kind == "shuffle":
                n, c, h, w = x.shape
                x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
            return x
        y = self.fit(self.blocks(x))
        if self.kind == "gate":
            return x * y.sigmoid()
        return x + y if self.kind == "residual" else y


def make(i: int, recipe: Recipe) -> Leaf | Nest:
    kind, inside = recipe
    return Leaf(kind, i, inside[0]) if kind in KINDS else Nest(kind, i, inside)


def chain(i: int, inner: tuple[Recipe, ...] | list[Recipe]) -> nn.Sequential:
    blocks = []
    for recipe in inner:
        blocks.append(make(i, recipe))
        i = blocks[-1].out
    return nn.Sequential(*blocks)


def width(blocks: nn.Sequential, i: int) -> int:
    return blocks[-1].out if len(blocks) else i


class RandomNet(nn.Module):
    """Stem, random blocks, head."""

    def __init__(self, inner: list[Recipe]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = chain(8, inner)
        self.head = nn.Linear(width(self.body, 8), 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.norm(self.stem(x)).relu()).mean((2, 3)))
