"""Runs on real tensors without the arithmetic that costs time.

Models whose control flow depends on values (detectors sort, threshold and index by their scores) cannot run on the
meta device. Here every convolution and matrix product returns made-up values instead of computing them. The values
depend on nothing but the result's shape: a shrunk copy, whose scores have the same shape, takes the same decisions.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from widthkit.graph.program import MATRIX_PRODUCTS
from widthkit.trace.context import flat_tensors
from widthkit.trace.quick import quick

_HEAVY = {
    *(f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3)),
    *MATRIX_PRODUCTS,
    *("convolution", "roi_align", "scaled_dot_product_attention"),
}
_LARGE = 1 << 16
"""Element-wise operators, norms and pooling of feature maps above this size are not computed either."""
_LIGHT = {"batch_norm", "max_pool2d", "avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d"}
_DECIDING = {"gt", "lt", "ge", "le", "eq", "ne", "isnan", "isfinite", "logical_and", "logical_or", "logical_not"}
_PERIOD = 4099
"""A prime, so that the values do not repeat along a dim."""


class Cheap(TorchDispatchMode):
    """Runs a model by :func:`result`; under inference mode, where composite operators arrive whole, if not hollow."""

    def __init__(self, hollow: bool = False) -> None:
        super().__init__()
        self.hollow = hollow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the result of a call."""
        return result(func, args, kwargs or {}, self.hollow)


def result(func: Any, args: Any, kwargs: Any, hollow: bool = False) -> Any:
    """Return what a call returns, by the cheapest way that has its shape (:mod:`widthkit.trace.quick`).

    Args:
        func: The ATen operator.
        args: Positional arguments.
        kwargs: Keyword arguments.
        hollow: Make up what is costly.
    """
    if hollow and replaces(func, args, kwargs):
        return made_up(func, args, kwargs)
    out = quick(func, args, kwargs)
    return func(*args, **kwargs) if out is None else out


def replaces(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call is one of those that are not computed."""
    name, tensors = func.overloadpacket.__name__, flat_tensors((args, kwargs))
    if func.namespace not in ("aten", "torchvision") or (name in _HEAVY and func._schema.is_mutable):
        return False
    if name not in _HEAVY and not (_is_light(func, name) and any(t.ndim > 3 and t.numel() > _LARGE for t in tensors)):
        return False
    return all(t.is_floating_point() and t.device.type != "meta" for t in tensors)


def _is_light(func: Any, name: str) -> bool:
    returns = func._schema.returns
    if len(returns) != 1 or (func._schema.is_mutable and not name.endswith("_")):
        return False
    return name in _LIGHT or (torch.Tag.pointwise in func.tags and name not in _DECIDING)


def made_up(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Return a tensor as the call would, with values that depend on its shape alone."""
    if func._schema.is_mutable:
        target: Tensor = args[0]
        return target
    real = (args, kwargs)
    device = flat_tensors(real)[0].device
    meta_args, meta_kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), real)
    shape: Tensor = result(func, meta_args, meta_kwargs)
    base, n = _noise(device, shape.dtype), shape.numel()
    whole = n - n % _PERIOD
    out = base.new_empty(n)
    out[:whole].view(-1, _PERIOD).copy_(base)
    out[whole:] = base[: n - whole]
    return out.view(shape.shape)


@functools.lru_cache(maxsize=8)
def _noise(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(_PERIOD, generator=torch.Generator().manual_seed(0)).to(device, dtype)
