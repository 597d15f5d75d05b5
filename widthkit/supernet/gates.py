"""Gates: run a whole model with every unit multiplied by a factor where it is read.

A gate of 0 has the effect of dropping the unit, and gradients reach the gate. The factor is applied to what consumers
read (the input columns of the next layers' weights), behind norms, biases and activations. A channel that is set to 0
where it is written would not stay 0: a batch norm adds its bias, and sigmoid(0) is 1/2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from widthkit.errors import ModelError
from widthkit.graph import ChannelGraph, IntArray, Positions
from widthkit.modules.merging import merging_module
from widthkit.train.modes import model_device


@dataclass(frozen=True)
class _Gated:
    """One place where gates are applied: a dim of a weight, or the channels that a module receives.

    Args:
        name: Name of the weight, or path of the module.
        dim: The dim that is scaled.
        index: Per position, which gate scales it; the last gate of all is the constant 1.
        input: Whether this is a module's input.
    """

    name: str
    dim: int
    index: Tensor
    input: bool = False


class Gates:
    """Where the units of a model are read.

    Args:
        model: The model to run.
        graph: Its channel graph, or that of the network it merges to.
        merged: The network it merges to, if it has blocks that do.

    Raises:
        ModelError: If a block merges to more than one layer that reads its input, so that no gate fits between them.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, merged: nn.Module | None = None) -> None:
        self.model = model
        self.graph = graph
        widths = graph.group_widths
        self._starts = np.cumsum(widths) - widths
        self.total = int(widths.sum())
        self._own = dict(model.named_parameters())
        self._places = self._find(merged)

    def run(self, gates: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the model.

        Args:
            gates: ``[units of all groups]``, in the graph's order.
            args: The model's arguments.
            kwargs: The model's keyword arguments.
        """
        factors = torch.cat([gates, gates.new_ones(1)])
        scaled: dict[str, Tensor] = {}
        # Moving a module to another device may replace its parameters.
        own = dict(self.model.named_parameters())
        with ExitStack() as stack:
            for place in self._places:
                factor = factors.index_select(0, place.index.to(factors.device))
                if place.input:
                    stack.enter_context(_input_scaled(self.model.get_submodule(place.name), factor, place.dim))
                else:
                    weight = scaled.get(place.name, own[place.name])
                    scaled[place.name] = weight * _along(factor, place.dim, weight)
            return functional_call(self.model, scaled, args, dict(kwargs))

    def of(self, units: Mapping[str, IntArray]) -> Tensor:
        """Return gates, ``[units of all groups]``: 1 for these units and 0 for all others."""
        parts = []
        for name, width in self.graph.full.items():
            parts.append(torch.zeros(width))
            parts[-1][torch.from_numpy(units[name])] = 1
        return torch.cat(parts).to(model_device(self.model))

    def _find(self, merged: nn.Module | None) -> list[_Gated]:
        """List the places of all groups; groups that no weight reads are scaled where they are written."""
        modules = dict((merged or self.model).named_modules())
        found, covered, blocks = [], set(), set()
        for info in self.graph.tensors.values():
            path, _, key = info.name.rpartition(".")
            for dim, positions in enumerate(info.dims):
                if positions is None or not positions.searchable or not _reads(modules.get(path), key, dim):
                    continue
                covered.update(np.unique(positions.group[positions.group >= 0]).tolist())
                if self._untouched(info.name, merged):
                    found.append(_Gated(info.name, dim, self._index(positions)))
                    continue
                place = self._input_of(info.name, modules[path], positions)
                if place.name in blocks:
                    raise ModelError(
                        f"{place.name} merges to several layers that read channels of different groups; "
                        "make each of them a block of its own"
                    )
                blocks.add(place.name)
                found.append(place)
        return found + self._written(set(range(len(self.graph.group_names))) - covered, modules)

    def _untouched(self, name: str, merged: nn.Module | None) -> bool:
        """Whether a weight of the merged network is also the model's, not made from several branches."""
        if merged is None or name not in self._own:
            return merged is None
        return merging_module(self.model, name.rpartition(".")[0]) is None or torch.equal(
            merged.get_parameter(name), self._own[name]
        )

    def _input_of(self, name: str, reader: nn.Module, positions: Positions) -> _Gated:
        """Return the input of the block that a reading layer is merged from."""
        block = merging_module(self.model, name.rpartition(".")[0])
        if block is None:
            raise ModelError(f"'{name}' is made by merging, but no block with fuse or reparameterize makes it")
        index = self._index(positions).repeat(getattr(reader, "groups", 1))
        return _Gated(block, -1 if isinstance(reader, nn.Linear) else 1, index, input=True)

    def _written(self, groups: set[int], modules: Mapping[str, nn.Module]) -> list[_Gated]:
        """List where groups are written that no weight reads, such as queries and keys."""
        found = []
        for group in sorted(groups):
            name = self.graph.group_names[group]
            sites = [s for s in self.graph.groups[name].sites if s.tensor in self._own]
            layers = [s for s in sites if isinstance(modules.get(s.tensor.rpartition(".")[0]), (nn.Linear, _ConvNd))]
            for site in layers or sites[:1]:
                positions = self.graph.tensors[site.tensor].dims[site.dim]
                assert positions is not None
                where = np.where(positions.group == group, positions.rank, -1)
                found.append(
                    _Gated(site.tensor, site.dim, self._index(Positions(np.where(where < 0, -1, group), where)))
                )
        return found

    def _index(self, positions: Positions) -> Tensor:
        index: IntArray = np.where(positions.group < 0, self.total, self._starts[positions.group] + positions.rank)
        with torch.inference_mode(False):
            return torch.from_numpy(index)


def _reads(module: nn.Module | None, key: str, dim: int) -> bool:
    """Whether a dim of a tensor contracts what the module receives."""
    if isinstance(module, _ConvTransposeNd):
        depthwise = module.groups > 1 and module.weight.shape[1] == 1
        return key == "weight" and dim == 0 and not depthwise
    if isinstance(module, (nn.Linear, _ConvNd)):
        return key == "weight" and dim == 1
    return isinstance(module, nn.MultiheadAttention) and key.endswith("proj_weight") and dim == 1


def _along(factor: Tensor, dim: int, tensor: Tensor) -> Tensor:
    """Shape a vector so that it scales one dim of a tensor."""
    shape = [1] * tensor.ndim
    shape[dim] = -1
    return factor.to(tensor.dtype).reshape(shape)


@contextmanager
def _input_scaled(module: nn.Module, factor: Tensor, dim: int) -> Iterator[None]:
    def scale(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * _along(factor, dim, args[0]), *args[1:])

    hook: Callable[..., Any] = scale
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
