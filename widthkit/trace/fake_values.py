"""Run operators on real tensors without computing the expensive ones.

Models whose control flow depends on values cannot run on the meta device: detectors sort, threshold and index by their
scores. Here convolutions, matrix products and operators on large feature maps return made-up values instead. These
values depend on nothing but the shape of the result. The scores of a shrunk copy have the same shape as those of the
full model, so both take the same decisions.
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
from widthkit.trace.shape_inference import infer

_ALWAYS_FAKED = {
    *(f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3)),
    *MATRIX_PRODUCTS,
    *("convolution", "roi_align", "scaled_dot_product_attention"),
}
_LARGE = 1 << 16
"""Above so many elements element-wise operators, norms and pooling of feature maps are not computed either."""
_FAKED_WHEN_LARGE = {"batch_norm", "max_pool2d", "avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d"}
_PREDICATES = {"gt", "lt", "ge", "le", "eq", "ne", "isnan", "isfinite", "logical_and", "logical_or", "logical_not"}
"""Element-wise operators whose results decide control flow; they are always computed."""
_PERIOD = 4099
"""Values repeat after so many elements; a prime, so that they do not repeat along a dim."""


class FakeValueMode(TorchDispatchMode):
    """Answer every operator with :func:`run_operator` instead of computing it.

    Args:
        fake_values: As in :func:`run_operator`.
    """

    def __init__(self, fake_values: bool = False) -> None:
        super().__init__()
        self.fake_values = fake_values

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the result of a call."""
        return run_operator(func, args, kwargs or {}, self.fake_values)


def run_operator(func: Any, args: Any, kwargs: Any, fake_values: bool = False) -> Any:
    """Return the result of a call, on the meta device by shape inference where possible.

    Args:
        func: The ATen operator.
        args: Positional arguments.
        kwargs: Keyword arguments.
        fake_values: Return made-up values for expensive operators on real tensors.
    """
    if fake_values and is_faked(func, args, kwargs):
        return fake_result(func, args, kwargs)
    out = infer(func, args, kwargs)
    return func(*args, **kwargs) if out is None else out


def is_faked(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call is expensive, so that its values are made up."""
    name, tensors = func.overloadpacket.__name__, flat_tensors((args, kwargs))
    if func.namespace not in ("aten", "torchvision") or (name in _ALWAYS_FAKED and func._schema.is_mutable):
        return False
    is_large = any(t.ndim > 3 and t.numel() > _LARGE for t in tensors)
    if name not in _ALWAYS_FAKED and not (is_large and _is_faked_when_large(func, name)):
        return False
    return all(t.is_floating_point() and t.device.type != "meta" for t in tensors)


def _is_faked_when_large(func: Any, name: str) -> bool:
    if len(func._schema.returns) != 1 or (func._schema.is_mutable and not name.endswith("_")):
        return False
    return name in _FAKED_WHEN_LARGE or (torch.Tag.pointwise in func.tags and name not in _PREDICATES)


def fake_result(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Return a tensor of the shape that the call would return, with values that depend on this shape alone."""
    if func._schema.is_mutable:
        target: Tensor = args[0]
        return target
    real = (args, kwargs)
    device = flat_tensors(real)[0].device
    meta_args, meta_kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), real)
    shape: Tensor = run_operator(func, meta_args, meta_kwargs)
    values, n = _random_values(device, shape.dtype), shape.numel()
    whole = n - n % _PERIOD
    out = values.new_empty(n)
    out[:whole].view(-1, _PERIOD).copy_(values)
    out[whole:] = values[: n - whole]
    return out.view(shape.shape)


@functools.lru_cache(maxsize=8)
def _random_values(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(_PERIOD, generator=torch.Generator().manual_seed(0)).to(device, dtype)
