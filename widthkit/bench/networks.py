"""Networks of one model to compare: dense, uniformly slim, searched, saved, and torch-pruning's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from widthkit.budget import parse_budget
from widthkit.errors import OptionError
from widthkit.export import export, load, origin_of
from widthkit.graph.space import uniform_space
from widthkit.modules.models import ModelName, create_model, input_channels
from widthkit.search.uniform import uniform_widths
from widthkit.trace import trace

_STEPS = 8
"""Halvings of torch-pruning's ratio until its network is taken."""


@dataclass(frozen=True)
class Comparison:
    """What is measured beside the dense network.

    Args:
        budget: What the uniform networks may cost.
        divisor: Widths of the uniform networks are multiples of this.
        slim: A saved slim network; the others then have its factory's arguments too.
        widths: Searched widths.
        peer: Whether to measure torch-pruning's uniform network.
    """

    budget: str = "0.5x"
    divisor: int = 8
    slim: Path | None = None
    widths: Mapping[str, int] | None = None
    peer: bool = True

    def networks(self, name: str, size: int) -> tuple[dict[str, nn.Module], dict[str, int]]:
        """Build the networks of one model; return them and their MACs per image.

        Args:
            name: The model.
            size: Side of the images in pixels.

        Raises:
            OptionError: If the saved network was made from another model.
        """
        saved, kwargs = self._saved(name)
        dense = create_model(name, **kwargs).eval()
        shape = (1, input_channels(dense), size, size)
        graph = trace(dense, shape)
        # With few choices, the narrowest width might round up to the only multiple that is left.
        space = uniform_space(graph, 256, min_width="0.05x", divisor=self.divisor)
        uniform = uniform_widths(space, parse_budget(self.budget, graph))
        nets = {"dense": dense, "uniform": export(dense, uniform, graph=graph)}
        if self.widths is not None:
            nets["searched"] = export(dense, self.widths, graph=graph)
        if saved is not None:
            nets["slim"] = saved.eval()
        macs = {key: trace(net, shape).macs() for key, net in nets.items()}
        if self.peer:
            peer = _torch_pruning(ModelName(name, kwargs), macs["uniform"], shape, self.divisor)
            nets["torch-pruning"], macs["torch-pruning"] = peer
        return nets, macs

    def _saved(self, name: str) -> tuple[nn.Module | None, Mapping[str, Any]]:
        """Load the saved network; return it with its factory's arguments, such as the number of classes."""
        if self.slim is None:
            return None, {}
        net = load(self.slim, allow=[name])
        origin = origin_of(net)
        if origin is None or origin.model is None or origin.model.name != name:
            made = origin.model.name if origin and origin.model else "another model"
            raise OptionError(f"{self.slim} was made from {made}, not from {name}; pass --model {made}")
        return net, origin.model.kwargs


def _torch_pruning(name: ModelName, most: int, shape: tuple[int, ...], divisor: int) -> tuple[nn.Module, int]:
    """Prune with torch-pruning at one ratio everywhere, the smallest ratio that costs at most ``most`` MACs."""
    import torch_pruning

    def pruned(ratio: float) -> tuple[nn.Module, int]:
        torch.manual_seed(0)
        net = name.build().eval()
        last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1:]
        torch_pruning.pruner.BasePruner(
            net,
            torch.zeros(shape),
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=last,
            round_to=divisor if divisor > 1 else None,
        ).step()
        macs, _ = torch_pruning.utils.count_ops_and_params(net, torch.zeros(shape))
        return net, int(macs)

    low, high = 0.0, 0.95
    best = pruned(high)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found = pruned(middle)
        if found[1] <= most:
            best, high = found, middle
        else:
            low = middle
    # torch-pruning counts norms and biases too; the MACs of all networks here are counted by the trace.
    return best[0], trace(best[0], shape).macs()
