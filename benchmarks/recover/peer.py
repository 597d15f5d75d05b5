"""The ways of torch-pruning: its importances, its group-norm sparse training, its own loop to a MACs target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.oracles.macs import counted_macs
from benchmarks.recover.setup import Ledger, Setup
from widthkit.train import StepContext, train
from widthkit.train.losses import cross_entropy
from widthkit.train.step import plain_step

STEPS = 400
"""Steps of its loop from the dense network to nothing, as in torch-pruning's own CIFAR benchmark."""
TAYLOR_IMAGES = 2048
REG = 5e-4
"""Strength of the group regulariser, as in torch-pruning's own CIFAR benchmark."""


class ConvShortcut(nn.Module):
    """A residual block whose option-A shortcut is written as a convolution with the same outputs.

    torch-pruning does not follow a padding of channels. The 1x1 convolution has ones where the padding copies.
    """

    def __init__(self, block: Any, inputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = block.conv1, block.bn1, block.conv2, block.bn2
        self.shortcut = nn.Conv2d(inputs, inputs + 2 * block.extra, 1, block.stride, bias=False)
        with torch.no_grad():
            self.shortcut.weight.zero_()
            rows = torch.arange(inputs)
            self.shortcut.weight[rows + block.extra, rows] = 1

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(self.shortcut(x) + y)


def with_conv_shortcuts(net: Any) -> Any:
    """Replace every padding shortcut in place; the outputs stay the same."""
    for stage in (net.layer1, net.layer2, net.layer3):
        for i, block in enumerate(stage):
            if block.extra:
                stage[i] = ConvShortcut(block, block.conv1.in_channels)
    return net


def inner_only(net: Any) -> list[nn.Module]:
    """List the layers that write the residual stream, and the head: torch-pruning then leaves the stream alone."""
    blocks = [block for stage in (net.layer1, net.layer2, net.layer3) for block in stage]
    return [net.conv1, net.linear, *(block.conv2 for block in blocks)]


def pruned(
    setup: Setup, ledger: Ledger, seed: int, macs: float, *, kind: str, stream: bool, scope: bool, folder: Any
) -> nn.Module:
    """Prune the trained network with torch-pruning.

    Args:
        setup: Network and data.
        ledger: Counts what it costs.
        seed: Seeds the sparse training.
        macs: MACs to end with.
        kind: ``l1``, ``taylor`` or ``sparse`` (group-norm sparse training, then group norms).
        stream: Whether the residual stream is pruned too; its shortcuts are then convolutions.
        scope: Rank over all groups, not group by group.
        folder: Checkpoints of the sparse training.
    """
    net = with_conv_shortcuts(setup.copy()) if stream else setup.copy()
    ignored = [net.linear] if stream else inner_only(net)
    importance = (
        tp.importance.GroupTaylorImportance()
        if kind == "taylor"
        else tp.importance.GroupMagnitudeImportance(p=1 if kind == "l1" else 2)
    )
    make = tp.pruner.GroupNormPruner if kind == "sparse" else tp.pruner.BasePruner
    pruner = make(
        net, setup.example, importance=importance, global_pruning=scope, pruning_ratio=1.0, max_pruning_ratio=0.95,
        iterative_steps=STEPS, ignored_layers=ignored, **({"reg": REG} if kind == "sparse" else {}),
    )  # fmt: skip
    dense = counted_macs(net, setup.example)
    if kind == "taylor":
        _leave_gradients(net, setup)
        ledger.trained("ranking", dense, TAYLOR_IMAGES)
    if kind == "sparse":
        epochs = max(1, round(setup.epochs / 3))
        train(
            Regularised(net, pruner), setup.train_batches(seed), epochs, seed=seed, out=folder / "sparse", resume=True,
            progress=False, **setup.final,
        )  # fmt: skip
        ledger.trained("sparse training", dense, epochs * setup.train_images)
    net.eval()
    while counted_macs(net, setup.example) > macs and pruner.current_step < STEPS:
        pruner.step()
    return net


class Regularised(nn.Module):
    """Adds torch-pruning's group regulariser to the gradients of every step."""

    def __init__(self, net: nn.Module, pruner: Any) -> None:
        super().__init__()
        self.net, self._pruner = net, pruner

    def train_step(self, step: StepContext) -> Tensor:
        """Train on one batch."""
        loss = plain_step(self.net, step)
        self._pruner.regularize(self.net)
        return loss


def _leave_gradients(net: nn.Module, setup: Setup) -> None:
    loss: Callable[[Any, Any], Tensor] = cross_entropy()
    net.eval().zero_grad()
    for images, labels in setup.held_out(TAYLOR_IMAGES):
        loss(net(images), labels).backward()
