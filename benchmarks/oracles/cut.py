"""The cut oracle: zero what consumers read of dropped channels, and compare with the exported network.

It holds where a zero reaches every consumer: in networks of plain convolutions, linear layers and batch norms, without
operators that mix channels outside those layers (attention, other norms, reductions over channels, weights that are
computed before use).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.oracles.checks import outputs, same
from widthkit.export.dense import export
from widthkit.graph import ChannelGraph, IntArray
from widthkit.trace.context import bind, flat_tensors
from widthkit.trace.inputs import Inputs
from widthkit.trace.recorder import call_model

_MIXING = {
    "softmax", "log_softmax", "scaled_dot_product_attention", "matmul", "bmm", "baddbmm", "einsum", "layer_norm",
    "group_norm", "instance_norm", "rms_norm", "cumsum", "sort", "topk", "normalize", "norm", "linalg_vector_norm",
    "var", "std", "var_mean", "std_mean", "cdist", "addmm", "glu", "grid_sampler", "nms", "roi_align",
}  # fmt: skip
_REDUCING = {"mean", "sum", "amax", "amin", "max", "min", "prod", "argmax"}
_CONVOLVING = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")


class _Watch(TorchDispatchMode):
    """Notes why zeroing is not dropping here."""

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


def why_not(model: nn.Module, inputs: Inputs) -> str:
    """Say why the cut oracle does not apply to a model, or return an empty string where it does."""
    watch = _Watch(model)
    with torch.inference_mode(), watch:
        call_model(model, inputs)
    return watch.reason


def _reads(model: nn.Module, tensor: str, dim: int) -> bool:
    path, _, key = tensor.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return key == "weight" and dim == 0
    return key == "weight" and dim == 1 and isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))


def check_cut(
    model: nn.Module, graph: ChannelGraph, inputs: Inputs, units: Mapping[str, IntArray], tolerance: float
) -> None:
    """Compare the full model, its reads of dropped channels zeroed, with the exported one.

    Raises:
        CheckError: If they differ.
    """
    cut = copy.deepcopy(model)
    parameters = dict(cut.named_parameters())
    for name, group in graph.groups.items():
        dropped = np.setdiff1d(np.arange(group.width), units[name])
        for site in group.sites:
            if site.tensor in parameters and _reads(model, site.tensor, site.dim):
                where = torch.from_numpy(site.index[dropped].reshape(-1))
                parameters[site.tensor].data.index_fill_(site.dim, where, 0)
    same(outputs(export(model, units, graph=graph), inputs), outputs(cut, inputs), tolerance)
