"""What the suites run on: a small network and its supernets, batches, search spaces, a training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widthkit.graph import ChannelGraph, IntArray
from widthkit.graph.space import SearchSpace, flops_bins, uniform_space
from widthkit.supernet import Supernet, make_supernet
from widthkit.supernet.strategy import Strategy
from widthkit.trace import trace
from widthkit.train.losses import Loss, binding
from widthkit.train.step import StepContext

EXAMPLE = (2, 3, 6, 6)
CLASSES = 4

SPACES: Mapping[str, Callable[[ChannelGraph], SearchSpace]] = {
    "plain": lambda graph: uniform_space(graph, 4),
    "single choice": lambda graph: uniform_space(graph, 1),
    "shrink and grow": lambda graph: uniform_space(graph, 5, min_width="0.25x", max_width="1.5x"),
    "divisor": lambda graph: uniform_space(graph, 20, divisor=4),
    "bins": lambda graph: flops_bins(graph, 1.0),
    "one fixed": lambda graph: uniform_space(graph, 3, fixed={graph.group_names[0]: graph.full[graph.group_names[0]]}),
}
"""Name -> how to build that search space for a graph."""


class SmallNet(nn.Module):
    """A stem, an inverted residual and a head: widths coupled by an addition, by a depthwise layer, and free ones.

    Activations are smooth, so that a gradient of zero means "not trained" and not "not active".
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _block(3, 8, 3)
        self.expand = _block(8, 12, 1)
        self.depthwise = _block(12, 12, 3, groups=12)
        self.project = nn.Sequential(nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.top = _block(8, 6, 1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, 3, H, W]`` to scores ``[N, 4]``."""
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.head(self.top(x).mean((2, 3)))  # type: ignore[no-any-return]


def _block(inputs: int, outputs: int, kernel: int, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.SiLU())


def small_net(seed: int = 0) -> nn.Module:
    """Return the network in float64, in training mode, with batch norms that tell channels apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SmallNet()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
                nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return net.double()


@cache
def small_graph() -> ChannelGraph:
    """Return the network's channel graph; the same object every time, for it is pure data."""
    return trace(small_net(), torch.zeros(EXAMPLE, dtype=torch.float64))


def small_batch(seed: int = 0, n: int = 8) -> tuple[Tensor, Tensor]:
    """Return ``n`` random float64 images and class labels that depend on them."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn((n, *EXAMPLE[1:]), generator=generator, dtype=torch.float64)
    return images, (images[:, 0].mean((1, 2)) > 0).long() + 2 * (images[:, 1].mean((1, 2)) > 0).long()


def build_space(name: str, graph: ChannelGraph) -> SearchSpace:
    """Build one of :data:`SPACES`."""
    return SPACES[name](graph)


def build_net(strategy: Strategy, space: str = "plain", seed: int = 0) -> Supernet:
    """Build a supernet of :func:`small_net` over one of :data:`SPACES`."""
    graph = small_graph()
    return make_supernet(small_net(seed), strategy, graph=graph, space=build_space(space, graph))


def some_widths(net: Supernet, n: int = 6) -> list[dict[str, int]]:
    """Return the widest, the narrowest and ``n`` random width vectors of a supernet's space."""
    rng = np.random.default_rng(0)
    return [net.space.largest, net.space.smallest, *(net.space.sample(rng) for _ in range(n))]


def listed(paths: Sequence[Mapping[str, IntArray]]) -> list[dict[str, list[int]]]:
    """Return sub-networks as plain lists of units, which can be compared."""
    return [{name: np.asarray(units).tolist() for name, units in path.items()} for path in paths]


def make_step(
    seed: int = 0,
    *,
    index: int = 0,
    batch: tuple[Any, Any] | None = None,
    loss: Loss = F.cross_entropy,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
    teacher: Callable[[Any, Tensor], Tensor] | None = None,
) -> StepContext:
    """Return what a training step sees, without an engine: full precision, gradients by plain ``backward``.

    Args:
        seed: Seeds the step's generator.
        index: Number of updates done before.
        batch: Inputs and targets; :func:`small_batch` by default.
        loss: The criterion.
        backward: Called with every loss.
        teacher: Mixes a loss with what a teacher says of the outputs.
    """
    inputs, targets = batch if batch is not None else small_batch()
    generator = torch.Generator().manual_seed(seed)
    criterion = binding(loss)(inputs)
    return StepContext(inputs, targets, index, 0, criterion, backward, generator, nullcontext, teacher=teacher)
