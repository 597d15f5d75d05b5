"""The supernet: one set of weights that the sub-networks of all width vectors share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from widthkit.errors import Option, OptionError, WidthsError
from widthkit.graph import ChannelGraph, IntArray, Kept
from widthkit.graph.plan import Plan, apply_plan, kept_units, make_plan
from widthkit.graph.resize import grow
from widthkit.graph.space import SearchSpace
from widthkit.modules.clone import real_clone
from widthkit.modules.merging import merge
from widthkit.modules.structure import Dense
from widthkit.supernet.gates import Gates
from widthkit.supernet.places import capacities, unit_orders
from widthkit.supernet.ranking import Scores, arrange
from widthkit.supernet.slices import PreparedSlices, SlicedModel
from widthkit.supernet.strategy import Strategy, Units, check_paths
from widthkit.train.history import WidthHistory
from widthkit.train.modes import as_arguments
from widthkit.train.step import StepContext

_MOST_PREPARED = 64
"""How many prepared sub-networks are kept."""


class Supernet(nn.Module):
    """A model whose channel groups can be run at any width of a search space.

    Calling it runs the active sub-network: the model itself at first, another one after :meth:`set_widths`.

    Args:
        model: The dense model; it is copied and stays as it is.
        graph: Its channel graph.
        space: The widths to choose from.
        strategy: Which units stand for a width, and how a step trains.
        seed: Seeds the values of channels that the model does not have yet.
        scores: Scores that rank the model's units; the strategy then says where each goes.
        branched: The network to train, whose blocks merge to ``model``. A sub-network of it is the whole network with
            the missing units multiplied by 0 where they are read.
        reference: The channel graph of the network that costs such as ``"0.5x"`` refer to; the model's own by default.

    Attributes:
        model: The widest network, which holds all weights.
        graph: The channel graph of the model as it was given; costs of all widths are computed from it.
        reference: The channel graph that relative costs refer to: the first stage's, where a search has several.
        wide_graph: The channel graph of :attr:`model`.
        slices: Runs sub-networks on slices of the model's tensors.
        space: The search space.
        strategy: The sharing strategy.
        policy: What the strategy learns beside the weights, or ``None``.
        width_history: The width vectors with the least training loss.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        space: SearchSpace,
        strategy: Strategy,
        *,
        seed: int = 0,
        scores: Scores | None = None,
        branched: nn.Module | None = None,
        reference: ChannelGraph | None = None,
    ) -> None:
        super().__init__()
        plan, self.wide_graph = grow(graph, capacities(space, strategy))
        if branched is not None and scores is not None:
            raise OptionError("a network that merges cannot be ranked yet; leave out merges=True or ", Option("rank"))
        if branched is not None and plan.grows:
            raise OptionError(
                f"a network that merges cannot grow, and {strategy} asks for more units than it has; "
                "take another strategy or keep ",
                Option("max_width"),
                " at 1x",
            )
        self.merges = branched is not None
        self.model = apply_plan(model, plan, seed=seed) if branched is None else real_clone(branched)
        if scores is not None:
            arrange(self.model, self.wide_graph, unit_orders(space, strategy, scores))
        self._gates = Gates(self.model, self.wide_graph, model) if branched is not None else None
        self.training = self.model.training
        self.dense = Dense.of(model)
        self.graph = graph
        self.reference = reference or graph
        self.space = space
        self.strategy = strategy
        self.seed = seed
        self.width_history = WidthHistory(graph.group_names)
        self._choices = {g.name: g for g in space.groups}
        self.slices = SlicedModel(self.model)
        self._prepared: OrderedDict[tuple[bytes, ...], PreparedSlices] = OrderedDict()
        self._active: Units = {name: np.arange(width) for name, width in graph.full.items()}
        self.policy = strategy.attach(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active sub-network."""
        return self._run(self._active, args, kwargs)

    def paths(self, widths: Mapping[str, int]) -> list[dict[str, IntArray]]:
        """List the sub-networks that stand for a width vector; groups that are not named are as in the model.

        Raises:
            WidthsError: If a group is unknown or a width exceeds its group's widest choice.
        """
        unknown = set(widths) - set(self._choices)
        if unknown:
            kept_units(self.graph, {min(unknown): 1})
        vector = {name: widths.get(name, choices.width) for name, choices in self._choices.items()}
        for name, width in vector.items():
            widest = self._choices[name].widest
            if not 1 <= width <= widest:
                raise WidthsError(f"group '{name}': width {width} is outside 1..{widest}, the supernet's range")
        found = self.strategy.subnetworks(self, vector)
        check_paths(self.strategy, found, vector, self.wide_graph.full)
        return found

    def set_widths(self, widths: Kept | None = None, path: int = 0) -> Supernet:
        """Make a sub-network the active one and return the supernet.

        Args:
            widths: Group name -> width, or the units themselves for every group; ``None`` is the model as given.
            path: Which of the strategy's paths for these widths.

        Raises:
            WidthsError: If the widths do not fit.
        """
        self._active = self.units(widths, path)
        return self

    @property
    def active(self) -> dict[str, IntArray]:
        """The units of the active sub-network."""
        return dict(self._active)

    def units(self, widths: Kept | None, path: int = 0) -> dict[str, IntArray]:
        """Return the supernet's units that stand for widths (or for explicit units) on one path."""
        plain, explicit = {}, {}
        for name, value in (widths or {}).items():
            if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
                plain[name] = int(value)
            else:
                explicit[name] = value
        paths = self.paths(plain)
        if not 0 <= path < len(paths):
            raise WidthsError(f"path {path} does not exist; the strategy has {len(paths)} per width")
        units = paths[path]
        checked = kept_units(self.wide_graph, explicit)
        for name in explicit:
            if int(checked[name][-1]) >= self.wide_graph.full[name]:
                raise WidthsError(f"group '{name}': unit {checked[name][-1]} is past the supernet's end")
            units[name] = checked[name]
        return units

    def plan(self, units: Units | None = None) -> Plan:
        """Return the plan of a sub-network, the active one by default."""
        return make_plan(self.wide_graph, units if units is not None else self._active)

    def forward_on(self, units: Units, step: StepContext) -> Any:
        """Run one sub-network on a training batch, under the step's precision."""
        with step.amp():
            return self.run(units, step.inputs)

    def forward_gated(self, gates: Tensor, step: StepContext) -> Any:
        """Run the whole network on a training batch, with every unit scaled by its gate where it is read.

        Args:
            gates: ``[units of all groups]``, group after group in the graph's order; gradients reach them.
            step: The batch.
        """
        if self._gates is None:
            self._gates = Gates(self.model, self.wide_graph)
        args, kwargs = as_arguments(step.inputs)
        with step.amp():
            return self._gates.run(gates, args, kwargs)

    def run(self, units: Units, inputs: Any) -> Any:
        """Run one sub-network on inputs: a tensor, a tuple of arguments, or a mapping of keyword arguments."""
        return self._run(units, *as_arguments(inputs))

    def whole(self) -> nn.Module:
        """Return the dense network that plans are applied to: the model, or what it merges to."""
        return merge(self.model) if self.merges else self.model

    def _run(self, units: Units, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.merges:
            assert self._gates is not None
            return self._gates.run(self._gates.of(units), args, kwargs)
        with self.slices.narrowed(self.prepare(units)):
            return self.model(*args, **kwargs)

    def train_step(self, step: StepContext) -> Tensor:
        """Let the strategy train on one batch; return the loss to show."""
        return self.strategy.train_step(self, step)

    def record(self, widths: Mapping[str, int], loss: Tensor) -> None:
        """Record the loss of a width vector on a training batch; :attr:`width_history` keeps the least ones.

        Strategies call this for the widths that they train. The loss is that of the task, on the labels, so that
        losses of different widths can be compared.

        Args:
            widths: Group name -> width, for every group.
            loss: A scalar; it is detached.

        Raises:
            PluginError: If a group is missing or unknown, or if the loss is no scalar tensor.
        """
        self.width_history.record(widths, loss)

    def after_update(self) -> None:
        """Let the strategy follow an update of the weights; a training loop of your own calls this after each one."""
        self.strategy.after_update(self)

    def end_epoch(self) -> dict[str, float]:
        """Return the strategy's figures of the epoch that has just ended."""
        return self.strategy.end_epoch(self)

    def chosen(self) -> dict[str, IntArray] | None:
        """Return the units that training has chosen; ``None`` if widths are searched after training."""
        return self.strategy.chosen(self)

    def rng(self, step: StepContext) -> np.random.Generator:
        """Return a NumPy generator for a step, seeded by the step's generator, so that processes draw differently."""
        return np.random.default_rng(int(torch.randint(2**62, (1,), generator=step.generator)))

    def prepare(self, units: Units) -> PreparedSlices:
        """Prepare a sub-network for :meth:`SlicedModel.narrowed`; those used last are kept."""
        key = tuple(np.ascontiguousarray(units[name]).tobytes() for name in self.wide_graph.group_names)
        if key not in self._prepared:
            self._prepared[key] = self.slices.prepare(make_plan(self.wide_graph, units))
            if len(self._prepared) > _MOST_PREPARED:
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(key)
        return self._prepared[key]

    def extra_repr(self) -> str:
        """Show strategy and space."""
        return f"strategy={self.strategy}, groups={len(self._choices)}, space={self.space.size:.3g}"
