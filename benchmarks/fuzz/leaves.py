"""Blocks without blocks inside: one class per way in which channels are coupled.

Every leaf takes images of ``i`` channels and returns images of ``out`` channels and the same size; ``size`` sets its
inner width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Leaf(nn.Module):
    """A block; subclasses compute what comes before norm and activation."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.out = out
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """Compute, normalise, activate."""
        return F.relu(self.norm(self.body(x)))

    def body(self, x: Tensor) -> Tensor:
        """Return the images to normalise."""
        raise NotImplementedError


class Conv(Leaf):
    """Dense, dilated, grouped or depthwise convolution."""

    def __init__(self, i: int, size: int, kind: str) -> None:
        super().__init__(i if kind == "depthwise" else 2 * size)
        groups = {"depthwise": i, "grouped": 2 if i % 2 == 0 else 1}.get(kind, 1)
        dilation = 2 if kind == "dilated" else 1
        self.conv = nn.Conv2d(i, self.out, 3, padding=dilation, dilation=dilation, groups=groups)

    def body(self, x: Tensor) -> Tensor:
        """Convolve."""
        return self.conv(x)  # type: ignore[no-any-return]


class Transposed(Leaf):
    """Transposed convolution."""

    def __init__(self, i: int, size: int) -> None:
        super().__init__(2 * size)
        self.conv = nn.ConvTranspose2d(i, self.out, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        """Convolve."""
        return self.conv(x)  # type: ignore[no-any-return]


class Squeeze(Leaf):
    """Squeeze and excitation."""

    def __init__(self, i: int, size: int) -> None:
        super().__init__(i)
        self.down, self.up = nn.Linear(i, size), nn.Linear(size, i)

    def body(self, x: Tensor) -> Tensor:
        """Scale every channel by a function of the means of all channels."""
        return x * self.up(F.relu(self.down(x.mean((2, 3))))).sigmoid()[:, :, None, None]  # type: ignore[no-any-return]


class Shared(Leaf):
    """One convolution, called twice."""

    def __init__(self, i: int, size: int) -> None:
        super().__init__(2 * size)
        self.first, self.conv = nn.Conv2d(i, self.out, 1), nn.Conv2d(self.out, self.out, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        """Convolve, twice."""
        return self.conv(self.conv(self.first(x)).relu())  # type: ignore[no-any-return]


class Dead(Leaf):
    """A result that is not used, and a module that is not called."""

    def __init__(self, i: int, size: int) -> None:
        super().__init__(2 * size)
        self.conv, self.idle = nn.Conv2d(i, self.out, 3, padding=1), nn.Conv2d(i, size, 1)
        self.unused = nn.Conv2d(3, 5, 1)

    def body(self, x: Tensor) -> Tensor:
        """Convolve, and drop the result of another convolution."""
        self.idle(x)
        return self.conv(x)  # type: ignore[no-any-return]


class Slopes(Leaf):
    """PReLU with one slope a channel."""

    def __init__(self, i: int, size: int) -> None:
        super().__init__(i)
        self.act = nn.PReLU(i)

    def body(self, x: Tensor) -> Tensor:
        """Apply the PReLU."""
        return self.act(x)  # type: ignore[no-any-return]


class Twice(Leaf):
    """A tensor concatenated with itself."""

    def __init__(self, i: int, size: int) -> None:
        super().__init__(2 * size)
        self.conv = nn.Conv2d(2 * i, self.out, 1)

    def body(self, x: Tensor) -> Tensor:
        """Concatenate, then convolve."""
        return self.conv(torch.cat([x, x], 1))  # type: ignore[no-any-return]


class Slice(Leaf):
    """Skips the first channels; their number is an attribute."""

    def __init__(self, i: int, size: int) -> None:
        super().__init__(2 * size)
        self.conv = nn.Conv2d(i - i // 2, self.out, 3, padding=1)
        self.skipped = i // 2

    def body(self, x: Tensor) -> Tensor:
        """Convolve the rest."""
        return self.conv(x[:, self.skipped :])  # type: ignore[no-any-return]


class Standardised(Leaf):
    """A convolution whose kernel is centred before use."""

    def __init__(self, i: int, size: int) -> None:
        super().__init__(2 * size)
        self.conv = nn.Conv2d(i, self.out, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        """Convolve with the centred kernel."""
        weight = self.conv.weight
        return F.conv2d(x, weight - weight.mean((1, 2, 3), keepdim=True), self.conv.bias, padding=1)


class Shuffled(Leaf):
    """A pixel shuffle, which turns channels into pixels."""

    def __init__(self, i: int, size: int) -> None:
        super().__init__(2 * size)
        self.wide, self.conv = nn.Conv2d(i, 4 * size, 1), nn.Conv2d(size, self.out, 3, stride=2, padding=1)

    def body(self, x: Tensor) -> Tensor:
        """Enlarge by a pixel shuffle, then shrink by a stride."""
        return self.conv(F.pixel_shuffle(self.wide(x), 2))  # type: ignore[no-any-return]


class Cut(Leaf):
    """Treats the first channels differently; their number is fixed."""

    def __init__(self, i: int, size: int) -> None:
        super().__init__(i)
        self.first, self.rest = slice(0, min(size, i)), slice(min(size, i), None)

    def body(self, x: Tensor) -> Tensor:
        """Apply a sine to the first channels."""
        return torch.cat([x[:, self.first].sin(), x[:, self.rest]], 1)


class Written(Leaf):
    """Writes into the first half of its channels."""

    def __init__(self, i: int, size: int) -> None:
        super().__init__(i)

    def body(self, x: Tensor) -> Tensor:
        """Scale the first half in place."""
        x = x.clone()
        x[:, : x.shape[1] >> 1] *= -0.5
        return x


class Asking(Leaf):
    """Adds its input where the shapes agree."""

    def __init__(self, i: int, size: int) -> None:
        super().__init__(2 * size)
        self.conv = nn.Conv2d(i, self.out, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        """Convolve, and add the input if it has as many channels."""
        y: Tensor = self.conv(x)
        return y + x if y.shape == x.shape else y
