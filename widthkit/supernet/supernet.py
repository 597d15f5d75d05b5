"""The weight-sharing net: one set of weights, every width vector of a space a sub-network of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from widthkit.errors import Option, OptionError, PluginError, TraceError, WidthsError
from widthkit.graph import ChannelGraph, IntArray, Kept
from widthkit.graph.plan import Plan, apply_plan, grow, kept_units, make_plan
from widthkit.graph.space import SearchSpace, WidthBound, make_space
from widthkit.modules.clone import real_clone
from widthkit.modules.merging import merge
from widthkit.modules.structure import Dense
from widthkit.supernet.gates import Gates
from widthkit.supernet.ranking import Scores, arrange, rankings, unit_scores
from widthkit.supernet.slices import Borrower
from widthkit.supernet.strategy import Path, Strategy, check_paths, make_strategy
from widthkit.trace import trace
from widthkit.train.history import WidthHistory
from widthkit.train.modes import as_arguments, model_device
from widthkit.train.step import StepContext

_CACHED_PLANS = 64


class Supernet(nn.Module):
    """A model whose channel groups can be run at any width of a search space.

    Calling it runs the active sub-network: the model itself at first, another one after :meth:`set_widths`.

    Args:
        model: The dense model; it is copied and stays as it is.
        graph: Its channel graph.
        space: The widths to choose from.
        strategy: Which units stand for a width, and how a step trains.
        seed: Seeds the values of channels that the model does not have yet.
        scores: Importance of the model's units; the strategy then says where each goes.
        branched: The network to train, whose blocks merge to ``model``. Its sub-networks are the whole network with
            the units that they lack taken away where they are read.

    Attributes:
        model: The widest network, which holds all weights.
        graph: The channel graph of the model as it was given; it prices all widths.
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
    ) -> None:
        super().__init__()
        capacities = _capacities(space, strategy)
        plan, self.wide_graph = grow(graph, capacities)
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
            arrange(self.model, self.wide_graph, _orders(space, strategy, scores))
        self._gates = Gates(self.model, self.wide_graph, model) if branched is not None else None
        self.training = self.model.training
        self.dense = Dense.of(model)
        self.graph = graph
        self.space = space
        self.strategy = strategy
        self.seed = seed
        self.width_history = WidthHistory(graph.group_names, partial(_one_loss, strategy, space))
        self._choices = {g.name: g for g in space.groups}
        self._borrower = Borrower(self.model)
        self._prepared: OrderedDict[tuple[bytes, ...], Any] = OrderedDict()
        self._active: Path = {name: np.arange(width) for name, width in graph.full.items()}
        self.policy = strategy.attach(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active sub-network."""
        return self._call(self._active, args, kwargs)

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
        given = dict(widths or {})
        explicit = {n: v for n, v in given.items() if not isinstance(v, (int, np.integer))}
        plain = {n: int(v) for n, v in given.items() if isinstance(v, (int, np.integer)) and not isinstance(v, bool)}
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

    def plan(self, units: Path | None = None) -> Plan:
        """Return the plan of a sub-network, the active one by default."""
        return make_plan(self.wide_graph, units if units is not None else self._active)

    def forward_on(self, units: Path, step: StepContext) -> Any:
        """Run one sub-network on a training batch, under the step's precision."""
        with step.amp():
            outputs = self.run(units, step.inputs)
        self.width_history.ran(units, outputs)
        return outputs

    def forward_gated(self, gates: Tensor, step: StepContext) -> Any:
        """Run the whole network on a training batch, every unit scaled by its gate where it is read.

        Args:
            gates: ``[units of all groups]``, group after group in the graph's order; gradients reach them.
            step: The batch.
        """
        if self._gates is None:
            self._gates = Gates(self.model, self.wide_graph)
        args, kwargs = as_arguments(step.inputs)
        with step.amp():
            return self._gates.run(gates, args, kwargs)

    def run(self, units: Path, inputs: Any) -> Any:
        """Run one sub-network on inputs: a tensor, a tuple of arguments, or a mapping of keyword arguments."""
        return self._call(units, *as_arguments(inputs))

    def whole(self) -> nn.Module:
        """Return the dense network that plans are applied to: the model, or what it merges to."""
        return merge(self.model) if self.merges else self.model

    def _call(self, units: Path, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.merges:
            assert self._gates is not None
            return self._gates.run(self._open(units), args, kwargs)
        with self._borrower.lend(self.prepare(units)):
            return self.model(*args, **kwargs)

    def _open(self, units: Path) -> Tensor:
        parts = []
        for name, width in self.wide_graph.full.items():
            parts.append(torch.zeros(width))
            parts[-1][torch.from_numpy(units[name])] = 1
        return torch.cat(parts).to(model_device(self.model))

    def lend(self, prepared: Any) -> AbstractContextManager[nn.Module]:
        """Hold a prepared sub-network's tensors in the model."""
        return self._borrower.lend(prepared)

    def replaced(self, new: Callable[[str, nn.Module, Tensor], Tensor]) -> AbstractContextManager[None]:
        """Hold other tensors in the model: ``new(name, module, tensor)`` for every one."""
        return self._borrower.replaced(new)

    def train_step(self, step: StepContext) -> Tensor:
        """Let the strategy train one batch; returns the loss to show."""
        with self.width_history.watch(step):
            return self.strategy.train_step(self, step)

    def end_epoch(self) -> dict[str, float]:
        """Return the strategy's figures of the epoch that has just ended."""
        return self.strategy.end_epoch(self)

    def chosen(self) -> dict[str, IntArray] | None:
        """Return the units that training chose, or ``None`` where widths are still to be searched."""
        return self.strategy.chosen(self)

    def rng(self, step: StepContext) -> np.random.Generator:
        """Return the generator of a step, seeded from the step's own so that processes draw differently."""
        return np.random.default_rng(int(torch.randint(2**62, (1,), generator=step.generator)))

    @property
    def direct_gradients(self) -> bool:
        """Whether gradients of slices are added in place; turn off for ``torch.autograd.grad`` or hooks."""
        return self._borrower.direct

    @direct_gradients.setter
    def direct_gradients(self, value: bool) -> None:
        self._borrower.direct = value

    def prepare(self, units: Path) -> Any:
        """Prepare a sub-network for :meth:`lend`; those used last are kept."""
        key = tuple(np.ascontiguousarray(units[name]).tobytes() for name in self.wide_graph.group_names)
        if key not in self._prepared:
            self._prepared[key] = self._borrower.compile(make_plan(self.wide_graph, units))
            if len(self._prepared) > _CACHED_PLANS:
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(key)
        return self._prepared[key]

    def extra_repr(self) -> str:
        """Show strategy and space."""
        return f"strategy={self.strategy}, groups={len(self._choices)}, space={self.space.size:.3g}"


def _one_loss(strategy: Strategy, space: SearchSpace, widths: Mapping[str, int], losses: list[float]) -> float:
    """Turn the training losses of a width vector's paths into one, as the strategy does with scores."""
    first = space.groups[0]
    if len(losses) > 1 and len(losses) == len(strategy.paths(widths[first.name], first)):
        return -strategy.combine([-loss for loss in losses])
    return sum(losses) / len(losses)


def _capacities(space: SearchSpace, strategy: Strategy) -> dict[str, int]:
    capacities = {}
    for choices in space.groups:
        capacity = strategy.capacity(choices)
        if not isinstance(capacity, (int, np.integer)) or isinstance(capacity, bool):
            raise PluginError(
                f"strategy {type(strategy).__name__}: capacity() of group '{choices.name}' must be a whole number, "
                f"not {capacity!r}"
            )
        if capacity < choices.widest:
            raise OptionError(
                f"strategy {type(strategy).__name__} gives group '{choices.name}' {capacity} units, "
                f"fewer than its widest choice {choices.widest}"
            )
        capacities[choices.name] = max(capacity, choices.width)
    return capacities


def _orders(space: SearchSpace, strategy: Strategy, scores: Scores) -> dict[str, IntArray]:
    ranked = rankings(scores)
    orders = {}
    for choices in space.groups:
        ranking = ranked.get(choices.name)
        if ranking is None or len(ranking) != choices.width:
            raise OptionError(Option("rank"), f" needs {choices.width} scores for group '{choices.name}'")
        order = np.asarray(strategy.order(ranking, choices))
        capacity = max(strategy.capacity(choices), choices.width)
        fits = order.ndim == 1 and choices.width <= len(order) <= capacity
        if not fits or set(order[: choices.width]) != set(range(choices.width)):
            raise OptionError(
                f"strategy {type(strategy).__name__}: order() of group '{choices.name}' must name each of its "
                f"{choices.width} units once, then at most {capacity - choices.width} copies"
            )
        orders[choices.name] = order
    return orders


def make_supernet(
    model: nn.Module,
    strategy: str | Strategy = "bc",
    *,
    example_inputs: Any = None,
    graph: ChannelGraph | None = None,
    space: SearchSpace | None = None,
    k: int = 20,
    bins: float | None = None,
    min_width: WidthBound = "0.1x",
    max_width: WidthBound = "1x",
    divisor: int = 1,
    fixed: Mapping[str, int] | None = None,
    freeze: Sequence[str] = (),
    free_outputs: bool = False,
    seed: int = 0,
    rank: str | Scores | None = None,
    rank_data: Iterable[Any] | None = None,
    rank_loss: Callable[[Any, Any], Tensor] | None = None,
    merges: bool = False,
    **options: Any,
) -> Supernet:
    """Turn any model into a weight-sharing supernet.

    Args:
        model: Any ``nn.Module``; it is copied and stays as it is.
        strategy: Name of a registered strategy, or an instance.
        example_inputs: As in :func:`widthkit.trace`; inferred where possible.
        graph: A channel graph of this model, if it has been traced already.
        space: A search space; the next six arguments build one otherwise.
        k: Evenly spaced choices per group.
        bins: If given, FLOPs-sensitive bins with this beta instead of ``k`` choices.
        min_width: Narrowest width: units, or a ratio such as ``"0.15x"``.
        max_width: Widest width; ``"1.5x"`` makes the supernet wider than the model.
        divisor: Widths are multiples of this, except the widest.
        fixed: Group name -> the one width that it keeps.
        freeze: Module paths or patterns whose output widths stay.
        free_outputs: Let the model's outputs vary in width.
        seed: Seeds the values of channels that the model does not have yet.
        rank: For models that are trained already: order units by importance before they are shared, so that narrow
            networks get the useful ones: a criterion of :func:`widthkit.supernet.ranking.unit_scores`, or its scores.
            At full width the output stays what it was.
        rank_data: Batches ``(inputs, targets)`` for the criteria that need gradients.
        rank_loss: Their loss; cross entropy by default.
        merges: The model has blocks that merge (RepVGG, MobileOne, :mod:`widthkit.modules.blocks`, your own): train the
            branches, but take widths from the merged network, where every layer is free; exports are merged.
        **options: Options of the strategy.

    Returns:
        The supernet, an ``nn.Module``.

    Raises:
        WidthkitError: If anything does not fit; the model is unchanged.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> net = make_supernet(model, "bc", example_inputs=(1, 3, 8, 8), k=4)
    >>> net.set_widths({"0": 2})(torch.zeros(1, 3, 8, 8)).shape
    torch.Size([1, 4, 4, 4])
    """
    chosen = make_strategy(strategy, options)
    branched, model = (model, merge(model).train(model.training)) if merges else (None, model)
    if graph is None:
        graph = trace(model, example_inputs, freeze=freeze, free_outputs=free_outputs)
    if not graph.group_names:
        raise TraceError(f"{type(model).__name__} has no channel group that can vary; widthkit trace shows the reasons")
    if space is None:
        space = make_space(
            graph, k=k, bins=bins, min_width=min_width, max_width=max_width, divisor=divisor, fixed=fixed
        )
    scores = unit_scores(model, graph, rank, data=rank_data, loss=rank_loss) if isinstance(rank, str) else rank
    return Supernet(model, graph, space, chosen, seed=seed, scores=scores, branched=branched)
