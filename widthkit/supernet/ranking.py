"""Rank the units of a model by torch-pruning's criteria, on groups built from the channel graph.

torch-pruning finds groups by following autograd. Here they come from the tracer, so a criterion works on every model
that can be traced. As in torch-pruning, a criterion scores convolutions, linear layers and norms; other tensors of a
group (free parameters, embeddings) do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy as shallow_copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map_only

from widthkit.errors import DataError, Option, OptionError, close_matches
from widthkit.graph import ChannelGraph, ChannelGroup, Site
from widthkit.modules.clone import named_tensors, real_clone
from widthkit.train.losses import Loss, binding, cross_entropy
from widthkit.train.modes import batch_size, call_model, model_device, split_batch

Scores = Mapping[str, npt.NDArray[np.float64]]
"""Group name -> ``[width]``: a number per unit, larger is more important."""

CRITERIA: Mapping[str, str] = {
    "magnitude": "MagnitudeImportance",
    "bn-scale": "BNScaleImportance",
    "lamp": "LAMPImportance",
    "fpgm": "FPGMImportance",
    "taylor": "TaylorImportance",
    "hessian": "HessianImportance",
}
"""Name here -> class of ``torch_pruning.pruner.importance``."""
NEEDS_DATA = ("taylor", "hessian")


def check_criterion(criterion: str, data: Iterable[Any] | None) -> None:
    """Refuse a criterion that is not known, or that needs data and has none.

    Raises:
        OptionError: If so.

    >>> check_criterion("tailor", None)
    Traceback (most recent call last):
    widthkit.errors.OptionError: unknown ranking criterion 'tailor': did you mean taylor?
    """
    if criterion not in CRITERIA:
        raise OptionError(f"unknown ranking criterion '{criterion}': {close_matches(str(criterion), CRITERIA)}")
    if criterion in NEEDS_DATA and data is None:
        raise OptionError(
            f"ranking criterion '{criterion}' needs gradients; pass batches (inputs, targets) to compute them on"
        )


def unit_scores(
    model: nn.Module,
    graph: ChannelGraph,
    criterion: str = "magnitude",
    *,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    training: bool = False,
) -> dict[str, npt.NDArray[np.float64]]:
    """Score every unit of every channel group.

    Args:
        model: The model that the graph was traced from; it stays as it is.
        graph: Its channel graph.
        criterion: ``magnitude`` (group L2 norm; DepGraph, Fang et al. 2023), ``bn-scale`` (Liu et al. 2017), ``lamp``
            (Lee et al. 2021), ``fpgm`` (He et al. 2019), ``taylor`` (Molchanov et al. 2019) or ``hessian`` (diagonal
            Fisher; LeCun et al. 1989).
        data: Batches ``(inputs, targets)`` for ``taylor`` and ``hessian``; ``hessian`` takes them sample by sample.
        loss: ``(outputs, targets) -> scalar``; cross entropy by default. It gets the batch's inputs too if it has a
            parameter named ``inputs``.
        training: Compute gradients in training mode, for models that return their losses only then.

    Returns:
        Group name -> float64 ``[width]``, larger is more important; ones for a group in which the criterion finds
        nothing to score. Scores are comparable within a group; all but ``lamp`` have mean 1 in every group.

    Raises:
        OptionError: If the criterion is not known or lacks data.
        DataError: If the data hold no batch.

    >>> from widthkit.trace import trace
    >>> net = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 1))
    >>> for i, size in enumerate((1.0, 4.0, 2.0)):
    ...     _ = nn.init.constant_(net[0].weight[i], size), nn.init.constant_(net[2].weight[:, i], size)
    >>> unit_scores(net, trace(net, (1, 1, 4, 4)))["0"].argsort().tolist()
    [0, 2, 1]
    """
    check_criterion(criterion, data)
    from torch_pruning.pruner import importance

    twin = real_clone(model).requires_grad_()
    if criterion in NEEDS_DATA:
        assert data is not None
        _fill_gradients(twin.train(training), data, loss or cross_entropy(), squared=criterion == "hessian")
    scorer = getattr(importance, CRITERIA[criterion])()
    found = {}
    for name, group in graph.groups.items():
        scores = scorer(pruning_group(twin, group))
        # With several positions per unit torch-pruning's sum may be longer than the group; what is past it is zero.
        values = np.ones(group.width) if scores is None else scores[: group.width].double().cpu().numpy()
        found[name] = np.where(np.isfinite(values), values, 0.0)
    return found


def pruning_group(model: nn.Module, group: ChannelGroup) -> Any:
    """Build torch-pruning's ``Group`` of one of our channel groups: which dims of which layers its units own."""
    from torch_pruning.dependency import Group

    items = [item for site in group.sites if (item := _item(model, site)) is not None]
    made = Group()
    # The criteria size their sum by the first item, so one with a single position per unit comes first.
    made._group = sorted(items, key=lambda item: len(item.idxs))
    return made


def _item(model: nn.Module, site: Site) -> Any:
    from torch_pruning._helpers import GroupItem
    from torch_pruning.dependency import Dependency, Node

    path, _, key = site.tensor.rpartition(".")
    layer = model.get_submodule(path)
    handler = _handler(layer, site.dim) if key == "weight" else None
    if handler is None:
        return None
    if isinstance(layer, _ConvNd) and layer.groups > 1:
        # Our positions are those of the weight's own dims, as in a convolution without groups; torch-pruning would
        # repeat them for every group, which fails for fpgm. The shallow copy shares the weight.
        layer = shallow_copy(layer)
        layer.groups = 1
    node = Node(layer, None, path)
    item = GroupItem(Dependency(handler, handler, node, node), site.index.reshape(-1).tolist())
    item.root_idxs = np.arange(len(site.index)).repeat(site.index.shape[1]).tolist()
    return item


def _handler(layer: nn.Module, dim: int) -> Any:
    """Return torch-pruning's function for cutting this dim of a layer's weight; ``None`` where it scores nothing."""
    from torch_pruning.pruner import function

    if isinstance(layer, _ConvNd):
        if layer.groups == layer.in_channels and layer.groups > 1:
            return function.prune_depthwise_conv_out_channels
        out = dim == (1 if layer.transposed else 0)
        return function.prune_conv_out_channels if out else function.prune_conv_in_channels
    if isinstance(layer, nn.Linear):
        return function.prune_linear_out_channels if dim == 0 else function.prune_linear_in_channels
    if isinstance(layer, _BatchNorm):
        return function.prune_batchnorm_out_channels
    return function.prune_layernorm_out_channels if isinstance(layer, nn.LayerNorm) else None


def _fill_gradients(model: nn.Module, data: Iterable[Any], loss: Loss, *, squared: bool) -> None:
    """Leave in every ``.grad`` the mean gradient of the samples, or the mean of their squared gradients."""
    tensors = {n: t for n, t in named_tensors(model).items() if t.requires_grad}
    totals = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    seen, bind = 0, binding(loss)
    for batch in data:
        inputs, targets = tree_map_only(Tensor, lambda t: t.to(model_device(model)), split_batch(batch))
        for x, y, n in _samples(inputs, targets) if squared else [(inputs, targets, batch_size(inputs))]:
            model.zero_grad(set_to_none=True)
            bind(x)(call_model(model, x), y).backward()
            for name, tensor in tensors.items():
                if tensor.grad is not None:
                    totals[name] += n * (tensor.grad.square() if squared else tensor.grad)
            seen += n
    if not seen:
        raise DataError("the data for the ranking hold no batch; pass a loader that is not used up")
    for name, tensor in tensors.items():
        tensor.grad = totals[name] / seen


def _samples(inputs: Any, targets: Any) -> list[tuple[Any, Any, int]]:
    """Take a batch of tensors apart into batches of one."""
    n = batch_size(inputs)

    def at(i: int) -> tuple[Any, Any]:
        pick: tuple[Any, Any] = tree_map_only(Tensor, lambda t: t[i : i + 1] if t.ndim else t, (inputs, targets))
        return pick

    return [(*at(i), 1) for i in range(n)]


def rankings(scores: Scores) -> dict[str, npt.NDArray[np.int64]]:
    """Group name -> units, the most important first; equal ones keep their order."""
    if not isinstance(scores, Mapping):
        raise OptionError(Option("rank"), f" is a criterion's name or a mapping of scores, not {scores!r}")
    return {name: np.argsort(-np.asarray(values), kind="stable") for name, values in scores.items()}


def arrange(model: nn.Module, graph: ChannelGraph, orders: Mapping[str, npt.NDArray[np.int64]]) -> None:
    """Rearrange the units of a model in place, at all sites of their groups.

    A permutation of a group's units does not change what a model computes. A unit may also come to several places: in a
    supernet that is wider than the model, a new channel can start as a copy.

    Args:
        model: The model.
        graph: Its channel graph.
        orders: Group name -> ``[places]``: the unit that comes to each place; places past its end keep theirs.
    """
    sources = {
        g: np.concatenate([orders[name], np.arange(len(orders[name]), graph.group_widths[g])])
        for g, name in enumerate(graph.group_names)
        if name in orders
    }
    tensors = named_tensors(model)
    with torch.no_grad():
        for group_index, name in enumerate(graph.group_names):
            if group_index not in sources:
                continue
            for site in graph.groups[name].sites:
                tensor = tensors[site.tensor]
                index = np.arange(tensor.shape[site.dim])
                index[site.index.reshape(-1)] = site.index[sources[group_index]].reshape(-1)
                tensor.copy_(tensor.index_select(site.dim, torch.from_numpy(index).to(tensor.device)))
