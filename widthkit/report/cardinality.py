"""How often a sharing strategy uses and trains every channel: counted from gradients, drawn as bars.

The cardinality of a channel (BCNet, Eq. 6 and 9; BCNetV2, Eq. 19 and 21) is the number of sub-networks that use it,
over all widths of its layer. A channel with a small cardinality is judged although it is hardly trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widthkit.files import atomic_write
from widthkit.graph import FloatArray, IntArray
from widthkit.graph.space import SearchSpace, WidthLimit, resolve_limit, uniform_space
from widthkit.report.png import png_bytes
from widthkit.supernet import Supernet, make_supernet
from widthkit.supernet.strategy import Strategy
from widthkit.trace import trace
from widthkit.train.step import StepContext

_IMAGE_SHAPE = (6, 3, 5, 5)


@dataclass(frozen=True)
class Cardinality:
    """How often each channel of one layer is used.

    Args:
        width: Channels of the layer in the model; a strategy may add channels.
        judged: ``[paths, channels]``: number of widths of the space at which each path uses a channel.
        trained: ``[channels]``: backward passes per training step that reach a channel; the mean over steps that draw
            every width equally often.
    """

    width: int
    judged: IntArray
    trained: FloatArray


@dataclass(frozen=True)
class _RoundRobinSpace(SearchSpace):
    """A space whose draws visit every width equally often: two steps with one width, then two with the next.

    Two steps, because some strategies treat odd and even steps differently. Further draws of one step take the next
    widths.
    """

    at: list[int] = field(default_factory=lambda: [0, 0])

    def sample(self, rng: np.random.Generator) -> dict[str, int]:
        step, draw = self.at
        self.at[1] += 1
        return {g.name: g.options[(step // 2 + draw) % len(g.options)] for g in self.groups}


def count_cardinality(
    strategy: Strategy, width: int = 12, min_width: WidthLimit = 1, *, min_steps: int = 72
) -> Cardinality:
    """Run a layer at every width, and through training steps, and count which channels the gradients reach.

    Args:
        strategy: The strategy.
        width: Channels of the layer; every number of channels is a choice.
        min_width: The narrowest width.
        min_steps: Training steps to count, at least; a strategy may draw more than widths at random.

    >>> from widthkit.supernet.strategy import STRATEGIES
    >>> count_cardinality(STRATEGIES.get(STRATEGIES.default)(), 4).judged.shape  # paths, channels
    (2, 4)
    """
    # With a smooth activation, a gradient of zero means that a channel was not used.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, width, 3), nn.Tanh(), nn.Conv2d(width, 4, 3), nn.Flatten()).double()
    graph = trace(model, torch.zeros(_IMAGE_SHAPE, dtype=torch.float64))
    plain = uniform_space(graph, width, min_width=min_width)
    space = _RoundRobinSpace(graph, plain.groups)
    net = make_supernet(model, strategy, graph=graph, space=space)
    return Cardinality(width, _judged(net), _trained(net, space, min_steps))


def _judged(net: Supernet) -> IntArray:
    (group,) = net.space.groups
    images, labels = _batch(0)
    rows: list[IntArray] = []
    for width in group.options:
        for path, units in enumerate(net.paths({group.name: width})):
            net.zero_grad()
            F.cross_entropy(net.run(units, images), labels).backward()
            if path == len(rows):
                rows.append(np.zeros_like(_reached(net)))
            rows[path] += _reached(net)
    return np.stack(rows)


def _trained(net: Supernet, space: _RoundRobinSpace, min_steps: int) -> FloatArray:
    total = np.zeros(len(_reached(net)))

    def backward(loss: Tensor) -> None:
        net.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        total.__iadd__(_reached(net))

    cycle = 2 * len(space.groups[0].options)
    steps = cycle * math.ceil(min_steps / cycle)
    for index in range(steps):
        space.at[:] = [index, 0]
        generator = torch.Generator().manual_seed(index)
        net.train_step(StepContext(*_batch(index), index, 0, F.cross_entropy, backward, generator, nullcontext))
    return np.asarray(total / steps)


def _reached(net: Supernet) -> IntArray:
    """Return ``[channels]``: 1 where a gradient has reached a channel of the layer, else 0."""
    weight = net.model[0].weight  # type: ignore[index]
    if weight.grad is None:
        return np.zeros(len(weight), dtype=np.int64)
    return np.asarray((weight.grad != 0).flatten(1).any(1).numpy(), dtype=np.int64)


def _batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(_IMAGE_SHAPE, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 4, _IMAGE_SHAPE[:1], generator=generator)


def draw_cardinality(
    strategies: Mapping[str, Strategy], path: str | Path, *, width: int = 12, base: WidthLimit = "0.25x"
) -> None:
    """Draw the cardinalities of several strategies, over all widths and over those from a base width up.

    Args:
        strategies: Label -> strategy; one column each.
        path: The picture, a PNG file.
        width: Channels of the layer.
        base: Narrowest width in the lower half of the picture.
    """
    from matplotlib.figure import Figure

    ranges: Sequence[WidthLimit] = (1, resolve_limit(base, width))
    figure = Figure(figsize=(1 + 2.6 * len(strategies), 8.8), layout="constrained")
    axes = figure.subplots(4, len(strategies), squeeze=False, sharey="row")
    n_paths = 1
    for half, narrowest in enumerate(ranges):
        for column, (label, strategy) in enumerate(strategies.items()):
            found = count_cardinality(strategy, width, narrowest)
            judged, trained = axes[2 * half][column], axes[2 * half + 1][column]
            _stacked(judged, found.judged, found.width)
            _stacked(trained, found.trained[None], found.width)
            n_paths = max(n_paths, len(found.judged))
            if not half:
                judged.set_title(label, fontweight="bold", pad=10)
            if not column:
                judged.set_ylabel(f"widths {narrowest} to {width}:\nsub-networks judged")
                trained.set_ylabel(f"widths {narrowest} to {width}:\nbackwards per step")
    for axis in axes[-1]:
        axis.set_xlabel("channel")
    for row in axes:
        row[0].set_ylim(0, 1.18 * row[0].get_ylim()[1])
    _legend(figure, min(n_paths, 10), width)
    atomic_write(Path(path), png_bytes(figure))


def _stacked(axis: Any, rows: IntArray | FloatArray, width: int) -> None:
    """Draw one bar per channel and one colour per path; a line separates channels that the strategy adds."""
    channels, bottom = np.arange(1, rows.shape[1] + 1), np.zeros(rows.shape[1])
    for path, row in enumerate(rows):
        axis.bar(channels, row, 0.85, bottom=bottom, color=f"C{path % 10}")
        bottom = bottom + row
    if len(channels) > width:
        axis.axvline(width + 0.5, color="0.4", linestyle=":", linewidth=1)
    spread = bottom.max() / bottom.min() if bottom.min() > 0 else math.inf
    axis.text(0.97, 0.95, f"most / least: {spread:.2f}", transform=axis.transAxes, ha="right", va="top", fontsize=8)
    axis.set_xticks([1, *((width,) if len(channels) > width + 1 else ()), len(channels)])
    axis.margins(x=0.02)


def _legend(figure: Any, n_paths: int, width: int) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    marks: list[Any] = [Patch(color=f"C{path}", label=f"path {path + 1} of a width") for path in range(n_paths)]
    marks.append(Line2D([], [], color="0.4", linestyle=":", label=f"channels past it are added to the layer's {width}"))
    figure.legend(handles=marks, loc="outside lower center", ncols=min(len(marks), 4), frameon=False, fontsize=9)
