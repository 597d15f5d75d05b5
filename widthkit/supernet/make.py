"""Turn a model into a supernet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from widthkit.errors import TraceError
from widthkit.graph import ChannelGraph
from widthkit.graph.space import SearchSpace, WidthLimit, make_space
from widthkit.modules.merging import merge
from widthkit.supernet.ranking import Scores, unit_scores
from widthkit.supernet.strategy import Strategy, make_strategy
from widthkit.supernet.supernet import Supernet
from widthkit.trace import trace


def make_supernet(
    model: nn.Module,
    strategy: str | Strategy | None = None,
    *,
    example_inputs: Any = None,
    graph: ChannelGraph | None = None,
    space: SearchSpace | None = None,
    k: int = 20,
    bins: float | None = None,
    min_width: WidthLimit = "0.1x",
    max_width: WidthLimit = "1x",
    divisor: int = 1,
    fixed: Mapping[str, int] | None = None,
    freeze: Sequence[str] = (),
    free_outputs: bool = False,
    seed: int = 0,
    rank: str | Scores | None = None,
    rank_data: Iterable[Any] | None = None,
    rank_loss: Callable[[Any, Any], Tensor] | None = None,
    merges: bool = False,
    budget: str | None = None,
    **options: Any,
) -> Supernet:
    """Turn any model into a weight-sharing supernet.

    Args:
        model: Any ``nn.Module``; it is copied and stays as it is.
        strategy: Name of a registered strategy, or an instance; by default the one that the installed plug-ins mark.
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
        budget: The budget of the search that follows, such as ``"0.5x"``, for strategies that use it in training.
        **options: Options of the strategy.

    Returns:
        The supernet, an ``nn.Module``.

    Raises:
        WidthkitError: If anything does not fit; the model is unchanged.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> net = make_supernet(model, example_inputs=(1, 3, 8, 8), k=4)
    >>> net.set_widths({"0": 2})(torch.zeros(1, 3, 8, 8)).shape
    torch.Size([1, 4, 4, 4])
    """
    chosen = make_strategy(strategy, options)
    if budget is not None:
        chosen = chosen.for_budget(budget)
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
