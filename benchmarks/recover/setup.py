"""What all ways have in common: network, data, settings and the count of the cost."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from widthkit.graph import ChannelGraph
from widthkit.modules.models import create_model
from widthkit.trace import trace
from widthkit.train import DataSplits, load_data, make_loader

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 128
FORWARD = 1 / 3
"""What the forward of one image costs, as a share of its training step."""


@dataclass(frozen=True)
class Setup:
    """One benchmark.

    Args:
        model: Name of the network, as in :func:`widthkit.create_model`.
        weights: File with its trained weights.
        data: An npz file with CIFAR-10's arrays.
        epochs: Total cost of every way, in epochs of the dense network.
        final: Settings of the final training, the same for every way.
        limit: Most training images; all by default.
    """

    model: str
    weights: Path
    data: Path
    epochs: float = 40
    final: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None

    @cached_property
    def splits(self) -> DataSplits:
        """The data; the held-out images are the same for all seeds."""
        augment = {"crop": 4, "flip": True}
        return load_data(f"npz:{self.data}", augment=augment, mean=MEAN, std=STD, seed=0, limit=self.limit)

    @cached_property
    def dense(self) -> nn.Module:
        """The trained network; copy it before changing it."""
        net = create_model(self.model, weights=self.weights)
        return net.eval().to(memory_format=torch.channels_last)

    @cached_property
    def graph(self) -> ChannelGraph:
        """Its channel graph."""
        return trace(self.dense, self.example)

    @property
    def example(self) -> torch.Tensor:
        """One image."""
        return torch.zeros(1, 3, 32, 32)

    @property
    def train_images(self) -> int:
        """Images of one epoch."""
        return len(self.splits.train)

    def copy(self) -> nn.Module:
        """Return a copy of the trained network."""
        return copy.deepcopy(self.dense)

    def train_batches(self, seed: int) -> DataLoader[Any]:
        """Return shuffled, augmented batches."""
        return make_loader(self.splits.train, BATCH, train=True, seed=seed)

    def fixed_batches(self, images: int) -> DataLoader[Any]:
        """Return batches of the first training images, in a fixed order; they are augmented like all of them."""
        return make_loader(Subset(self.splits.train, range(min(images, self.train_images))), BATCH, train=False)

    def held_out(self, images: int) -> DataLoader[Any]:
        """Return held-out batches; every stretch of them has all classes in proportion."""
        return make_loader(Subset(self.splits.valid, range(min(images, len(self.splits.valid)))), 512, train=False)

    @property
    def test_batches(self) -> DataLoader[Any]:
        """The test images."""
        return make_loader(self.splits.test, 512, train=False)


def final_settings(lr: float) -> dict[str, Any]:
    """Return how every way trains: SGD with Nesterov momentum, cosine to 0, the field's usual weight decay."""
    return {
        "optimizer": "sgd",
        "lr": lr,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "schedule": "cosine",
        "channels_last": True,
    }


class Ledger:
    """What a way has spent so far, in epochs of the dense network.

    Args:
        setup: Its training images are one epoch.
        macs: MACs of the dense network.
    """

    def __init__(self, setup: Setup, macs: int) -> None:
        self._images, self._macs = setup.train_images, macs
        self.entries: dict[str, float] = {}

    def trained(self, what: str, macs: float, images: float) -> None:
        """Count training steps of a network on so many images."""
        self.entries[what] = self.entries.get(what, 0.0) + macs / self._macs * images / self._images

    def ran(self, what: str, macs: float, images: float) -> None:
        """Count forwards of a network on so many images."""
        self.trained(what, macs * FORWARD, images)

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.entries.values())
