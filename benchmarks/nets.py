"""Networks small enough that dozens of trainings take minutes on one CPU core."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.resnet import BasicBlock

WIDTHS = (16, 24, 32, 32, 48, 64)


def plain_cnn(num_classes: int = 10, in_chans: int = 3) -> nn.Module:
    """Six 3x3 convolutions with batch norm, each a channel group of its own, for images of 16x16."""
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise((in_chans, *WIDTHS))):
        conv = nn.Conv2d(n_in, n_out, 3, stride=1 + i % 2, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], num_classes))


class SmallResNet(nn.Module):
    """Three stages of basic blocks behind a stem of stride 2 (He et al. 2015, the CIFAR layout, section 4.2).

    Args:
        num_classes: Classes.
        width: Channels of the first stage; every later one has twice as many.
        blocks: Basic blocks per stage.
    """

    def __init__(self, num_classes: int = 10, width: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        stages, inputs = [], width
        for stage in range(3):
            outputs = width * 2**stage
            for block in range(blocks):
                stages.append(_basic(inputs, outputs, stride=2 if stage and not block else 1))
                inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, 3, H, W]`` to scores ``[N, classes]``."""
        return self.head(self.stages(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


def _basic(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return BasicBlock(inputs, outputs)  # type: ignore[no-any-return]
    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride, shortcut)  # type: ignore[no-any-return]


def small_resnet(num_classes: int = 10) -> nn.Module:
    """Three stages of two basic blocks, 16 to 64 channels."""
    return SmallResNet(num_classes)


def small_mobilenetv2(num_classes: int = 10) -> nn.Module:
    """MobileNetV2 of torchvision at 0.25x, with fewer blocks and less downsampling, as 28x28 images need."""
    # Expansion, channels at 1x, blocks, stride; the stem halves the image before.
    layout = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 2, 2], [6, 64, 2, 2], [6, 96, 1, 1]]
    model = MobileNetV2(num_classes, width_mult=0.25, inverted_residual_setting=layout, dropout=0.0)
    # 1280 features are for 1000 classes.
    model.features[-1][0] = nn.Conv2d(24, 96, 1, bias=False)
    model.features[-1][1] = nn.BatchNorm2d(96)
    model.classifier[1] = nn.Linear(96, num_classes)
    model.last_channel = 96
    return model  # type: ignore[no-any-return]


MODELS = {"small-resnet": small_resnet, "small-mobilenetv2": small_mobilenetv2}
"""Name on the command line -> factory."""
