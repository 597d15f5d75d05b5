"""Blocks whose branches merge into one convolution, so that every layer has its own width (PaS, Fig. 2 d-g).

A residual connection over one convolution helps training and costs nothing in the merged network, because an identity
is a convolution as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ResidualConv(nn.Module):
    """A convolution with batch norm, an identity branch where shapes allow it, and an activation.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        kernel_size: Odd; the padding keeps the size.
        stride: Stride; only stride 1 has an identity branch.
        groups: Groups; equal to the channels for a depthwise convolution.
        act: The activation's class, or ``None``.

    >>> block = ResidualConv(8, 8, 3).eval()
    >>> x = torch.randn(2, 8, 5, 5)
    >>> torch.allclose(block.fuse()(x), block(x), atol=1e-5)
    True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        act: type[nn.Module] | None = nn.ReLU,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = act() if act is not None else nn.Identity()
        self.residual = in_channels == out_channels and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, C_in, H, W]`` to ``[N, C_out, H', W']``."""
        y = self.bn(self.conv(x))
        return self.act(y + x if self.residual else y)  # type: ignore[no-any-return]

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Return a convolution and the activation, which compute the same as this block in eval mode."""
        old, norm = self.conv, self.bn
        assert norm.running_var is not None
        assert norm.running_mean is not None
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        kernel = old.weight * scale.reshape(-1, 1, 1, 1)
        if self.residual:
            out, middle = torch.arange(old.out_channels), old.kernel_size[0] // 2
            kernel[out, out % old.weight.shape[1], middle, middle] += 1
        settings: dict[str, Any] = {"stride": old.stride, "padding": old.padding, "groups": old.groups}
        conv = nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size, **settings).to(kernel)  # type: ignore[arg-type]
        conv.weight.copy_(kernel)
        assert conv.bias is not None
        conv.bias.copy_(norm.bias - norm.running_mean * scale)
        return nn.Sequential(conv, self.act).train(self.training)


def residual_separable(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Sequential:
    """Return a depthwise and a 1x1 convolution, each with its own identity branch (PaS's light block)."""
    return nn.Sequential(
        ResidualConv(in_channels, in_channels, kernel_size, stride, groups=in_channels),
        ResidualConv(in_channels, out_channels, 1),
    )
