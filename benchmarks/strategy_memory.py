"""Count the bytes of activations that a training step of every strategy keeps for its backward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.common import step_context
from widthkit.bench.files import write
from widthkit.graph.space import SearchSpace
from widthkit.modules.models import create_model
from widthkit.supernet import Supernet, make_supernet
from widthkit.supernet.strategy import STRATEGIES, make_strategy
from widthkit.trace import trace
from widthkit.train.step import StepContext


class Saved:
    """The bytes of activations that autograd keeps; two views of one storage count once.

    Attributes:
        peak: The most bytes kept at any moment.
        total: Bytes kept over the whole step, at the same time or not.
    """

    def __init__(self, batch: int) -> None:
        self.peak = self.total = self._now = 0
        self._batch = batch
        self._counts: dict[int, int] = {}

    def keep(self, tensor: Tensor) -> int | None:
        """Count a tensor; return what :meth:`drop` needs, or ``None`` if it is not counted."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if not tensor.ndim or tensor.shape[0] != self._batch or not storage.nbytes():
            return None
        if not self._counts.get(key):
            self._now += storage.nbytes()
            self.total += storage.nbytes()
            self.peak = max(self.peak, self._now)
        self._counts[key] = self._counts.get(key, 0) + 1
        return key

    def drop(self, key: int, size: int) -> None:
        """Forget a tensor that autograd no longer needs."""
        self._counts[key] -= 1
        if not self._counts[key]:
            self._now -= size


class _Kept:
    """A saved tensor; it is dropped when autograd's graph is freed."""

    def __init__(self, saved: Saved, tensor: Tensor) -> None:
        self.tensor, self._saved = tensor, saved
        self._key = saved.keep(tensor)
        self._size = tensor.untyped_storage().nbytes()

    def __del__(self) -> None:
        if self._key is not None:
            self._saved.drop(self._key, self._size)


@contextmanager
def count_saved(batch: int) -> Iterator[Saved]:
    """Count the activations that autograd saves in this scope: tensors with one row per example.

    Args:
        batch: Examples per batch. No layer may be that wide: weights of that many rows would count too.

    >>> layer = torch.nn.Linear(4, 4)
    >>> with count_saved(2) as saved:
    ...     layer(torch.zeros(2, 4)).tanh().sum().backward()
    >>> saved.peak  # the input and the output of tanh, 8 numbers each
    64
    """
    saved = Saved(batch)
    with saved_tensors_hooks(lambda tensor: _Kept(saved, tensor), lambda kept: kept.tensor):
        yield saved


def run(model: str, size: int, batch: int, names: list[str], out: Path | None) -> None:
    """Measure one step of every strategy, and print and write the table.

    Each row also holds the bytes of one backward pass for all paths of the width (BCNet, Eq. 10); iterative updates are
    compared with that.
    """
    console = Console()
    dense = create_model(model).train()
    graph = trace(dense, (1, 3, size, size))
    rows = []
    for name in names or STRATEGIES.names():
        strategy = make_strategy(name, {})
        net = make_supernet(dense, strategy, graph=graph)
        row = {"strategy": name, **measure(net, size, batch)}
        rows.append(row)
        share = row["peak_bytes"] / row["one_backward_bytes"]
        console.print(
            f"{name}: peak {row['peak_bytes'] / 2**20:.1f} MiB, over the step {row['total_bytes'] / 2**20:.1f} MiB, "
            f"all paths in one backward {row['one_backward_bytes'] / 2**20:.1f} MiB ({share:.2f} of it)",
            highlight=False,
            soft_wrap=True,
        )
    write(out, "strategy-memory", rows, model=model, image_size=size, batch=batch, widths="the model's own")


def measure(net: Supernet, size: int, batch: int) -> dict[str, Any]:
    """Count the bytes of one step at the model's own widths, so that strategies compare."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator)
    labels = torch.zeros(batch, dtype=torch.long)
    with _one_width(net), count_saved(batch) as saved:
        net.train_step(step_context(images, labels))
    paths = net.paths(net.graph.full)
    return {
        "forwards": net.strategy.cost.forwards,
        "backwards": net.strategy.cost.backwards,
        "peak_bytes": saved.peak,
        "total_bytes": saved.total,
        "one_backward_bytes": one_backward(net, paths, step_context(images, labels)),
    }


def one_backward(net: Supernet, paths: list[Any], step: StepContext) -> int:
    """Peak bytes when the losses of all paths are added and differentiated at once (BCNet, Eq. 10)."""
    with count_saved(len(step.targets)) as saved:
        losses = [step.loss(net.forward_on(units, step), step.targets) for units in paths]
        torch.stack(losses).mean().backward()
    net.zero_grad()
    return saved.peak


class _FullWidth(SearchSpace):
    """A space that always draws the model's own widths."""

    def sample(self, rng: np.random.Generator) -> dict[str, int]:
        """Return the model's own widths."""
        return {g.name: g.width for g in self.groups}


@contextmanager
def _one_width(net: Supernet) -> Iterator[None]:
    """Let the supernet draw the model's own widths only."""
    space = net.space
    net.space = _FullWidth(space.graph, space.groups, space.divisor)
    try:
        yield
    finally:
        net.space = space
        net.zero_grad()
