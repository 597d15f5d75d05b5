"""Leaves that mix channels outside convolutions: attention, layer norms, group norms, gates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.fuzz.leaves import Leaf


class Heads(Leaf):
    """Attention with the head size computed from the width, or with sizes kept as attributes."""

    def __init__(self, i: int, size: int, computed: bool) -> None:
        super().__init__(i)
        self.num_heads = 2 if i % 2 == 0 else 1
        self.computed = computed
        self.head_dim = i // self.num_heads if computed else size + 1
        inner = self.num_heads * self.head_dim
        self.sizes = [inner, inner, inner]
        self.qkv, self.proj = nn.Linear(i, 3 * inner), nn.Linear(inner, i)

    def body(self, x: Tensor) -> Tensor:
        """Attend over pixels."""
        b, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        n = tokens.shape[1]
        if self.computed:
            qkv = self.qkv(tokens).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
        else:
            parts = self.qkv(tokens).split(self.sizes, dim=-1)
            q, k, v = (t.view(b, n, self.num_heads, self.head_dim).transpose(1, 2) for t in parts)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        y = y.reshape(b, n, c) if self.computed else y.flatten(2)
        return x + self.proj(y).transpose(1, 2).reshape(b, c, h, w)  # type: ignore[no-any-return]


class Perceptron(Leaf):
    """Layer norm and two linear layers, channels last, scaled by a vector."""

    def __init__(self, i: int, size: int) -> None:
        super().__init__(i)
        self.ln, self.up, self.down = nn.LayerNorm(i), nn.Linear(i, 4 * size), nn.Linear(4 * size, i)
        self.gamma = nn.Parameter(torch.ones(i))

    def body(self, x: Tensor) -> Tensor:
        """Mix the channels of every pixel."""
        y = self.down(F.gelu(self.up(self.ln(x.permute(0, 2, 3, 1)))))
        return x + (self.gamma * y).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


class Grouped(Leaf):
    """Group norm."""

    def __init__(self, i: int, size: int) -> None:
        super().__init__(i)
        self.group = nn.GroupNorm(2 if i % 2 == 0 else 1, i)

    def body(self, x: Tensor) -> Tensor:
        """Normalise groups of channels."""
        return self.group(x)  # type: ignore[no-any-return]


class Gated(Leaf):
    """A gated linear unit."""

    def __init__(self, i: int, size: int) -> None:
        super().__init__(2 * size)
        self.conv = nn.Conv2d(i, 4 * size, 1)

    def body(self, x: Tensor) -> Tensor:
        """Gate one half with the other."""
        return F.glu(self.conv(x), 1)


class Named(Leaf):
    """A parameter that is a matrix, applied by einsum."""

    def __init__(self, i: int, size: int) -> None:
        super().__init__(2 * size)
        self.matrix = nn.Parameter(torch.randn(i, 2 * size))

    def body(self, x: Tensor) -> Tensor:
        """Multiply."""
        return torch.einsum("bihw,io->bohw", x, self.matrix)
