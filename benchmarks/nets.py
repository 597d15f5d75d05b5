"""A network that trains in seconds, for benchmarks of searching."""

from __future__ import annotations

import itertools

from torch import nn

WIDTHS = (16, 24, 32, 32, 48, 64)


def plain_cnn(num_classes: int = 10, in_chans: int = 3) -> nn.Module:
    """Six 3x3 convolutions with batch norm, each a channel group of its own, for images of 16x16."""
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise((in_chans, *WIDTHS))):
        conv = nn.Conv2d(n_in, n_out, 3, stride=1 + i % 2, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], num_classes))
