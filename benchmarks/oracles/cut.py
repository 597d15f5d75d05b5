"""The cut oracle: zero what consumers read of dropped channels in the full model; it then equals the exported network.

The truth is the full model's own forward pass. The oracle holds where a zero reaches every consumer: in networks of
convolutions, linear layers and batch norms, without operators that mix channels outside these layers (attention, other
norms, reductions over channels, weights that are computed before use). :func:`why_not` tells such models.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.oracles.outputs import TOLERANCE, OracleError, check_equal, outputs, widths_of
from widthkit.export.dense import export
from widthkit.graph import ChannelGraph, IntArray, Site
from widthkit.trace.context import bind, flat_tensors
from widthkit.trace.inputs import as_inputs
from widthkit.trace.recorder import call_model

_MIXING = {
    "softmax", "log_softmax", "scaled_dot_product_attention", "matmul", "bmm", "baddbmm", "einsum", "layer_norm",
    "group_norm", "instance_norm", "rms_norm", "cumsum", "sort", "topk", "normalize", "norm", "linalg_vector_norm",
    "var", "std", "var_mean", "std_mean", "cdist", "addmm", "glu", "grid_sampler", "nms", "roi_align",
}  # fmt: skip
_REDUCING = {"mean", "sum", "amax", "amin", "max", "min", "prod", "argmax"}
_CONVOLVING = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def why_not(model: nn.Module, inputs: Any) -> str:
    """Say why the cut oracle does not apply to a model; the text is empty where it applies."""
    watch = _Watch(model)
    with torch.inference_mode(), watch:
        call_model(model, as_inputs(inputs))
    return watch.reason


class _Watch(TorchDispatchMode):
    """Records the first operator of a run for which zeroing a channel is not the same as dropping it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.reason = ""
        self.own = {id(p) for p in model.parameters()} | {id(b) for b in model.buffers()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _MIXING or (name in _REDUCING and _over_channels(bind(func, args, kwargs))):
            self.reason = self.reason or f"'{name}' mixes channels"
        if name in _CONVOLVING and id(bind(func, args, kwargs)["weight"]) not in self.own:
            self.reason = self.reason or "weights are computed before use"
        if name in _REDUCING and any(id(t) in self.own for t in flat_tensors(args)):
            self.reason = self.reason or "weights are computed before use"
        return func(*args, **kwargs)


def _over_channels(bound: Mapping[str, Any]) -> bool:
    x, dim = bound.get("self"), bound.get("dim")
    if not isinstance(x, torch.Tensor) or isinstance(bound.get("other"), torch.Tensor):
        return False
    dims = range(x.ndim) if dim is None or dim == [] else dim if isinstance(dim, (list, tuple)) else [dim]
    return any(d % max(x.ndim, 1) in (0, 1) for d in dims)


def check_cut(
    model: nn.Module,
    graph: ChannelGraph,
    inputs: Any,
    units: Mapping[str, IntArray],
    tolerance: float = TOLERANCE,
) -> None:
    """Compare the full model, its reads of dropped channels zeroed, with the exported one.

    Raises:
        OracleError: If they differ.
    """
    cut = copy.deepcopy(model)
    parameters = dict(cut.named_parameters())
    for name, group in graph.groups.items():
        dropped = np.setdiff1d(np.arange(group.width), units[name])
        for site in group.sites:
            if site.tensor in parameters and _reads(model, site):
                where = torch.from_numpy(site.index[dropped].reshape(-1))
                parameters[site.tensor].data.index_fill_(site.dim, where, 0)
    try:
        check_equal(outputs(export(model, units, graph=graph), inputs), outputs(cut, inputs), tolerance)
    except OracleError as error:
        raise OracleError(f"{error}, cut to widths {widths_of(units)}") from error


def _reads(model: nn.Module, site: Site) -> bool:
    """Whether a parameter reads channels there: dim 1 of convolutions and matrices, dim 0 of transposed ones."""
    path, _, key = site.tensor.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, _TRANSPOSED):
        return key == "weight" and site.dim == 0
    return site.dim == 1 and (isinstance(module, _CONVOLUTIONS) or model.get_parameter(site.tensor).ndim == 2)
