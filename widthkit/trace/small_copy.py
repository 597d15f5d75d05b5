"""A small copy of a model with random weights, and the example inputs to run it on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from widthkit.graph import ChannelGraph
from widthkit.graph.plan import Plan, make_plan, set_attribute
from widthkit.modules.clone import clone_with
from widthkit.trace.context import bind, flat_tensors
from widthkit.trace.inputs import Inputs
from widthkit.trace.recorder import same_operators
from widthkit.trace.recording import TracedCall

CAPS = (16, 8, 4, 2)
"""How many units every group keeps at most; the first number that is cheap enough is taken."""
_CHEAP_MACS = 60e6
MOST_MACS = 2e9
"""MACs of one run: of what is cheap, and of what is run at all."""
_SIDE = 64
"""Side length that larger images are cut to, where the model runs on such images."""


def small_plan(graph: ChannelGraph, batch: int, example: Inputs) -> tuple[Plan, float]:
    """Return the plan of the copy and the MACs of a run of it."""
    sizes = [t.shape[-2] * t.shape[-1] for t in flat_tensors(example) if _is_large_image(t)]
    share = min([_SIDE * _SIDE / size for size in sizes], default=1.0)
    rng = np.random.default_rng(0)
    for cap in CAPS:
        widths = {name: min(width, cap) for name, width in graph.full.items()}
        n_macs = graph.macs(widths) * batch * share
        if n_macs <= _CHEAP_MACS:
            break
    kept = {n: np.sort(rng.choice(graph.full[n], size=w, replace=False)).astype(np.int64) for n, w in widths.items()}
    return make_plan(graph, kept), n_macs


def small_copy(model: nn.Module, plan: Plan, dtype: torch.dtype) -> nn.Module:
    """Copy a model in evaluation mode on the CPU, as small as a plan says, with random weights.

    Random values are larger than those of a new model, whose zeros and ones would hide what is exchanged. Integer
    buffers keep their values.
    """
    generator = torch.Generator().manual_seed(0)

    def make(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.detach().cpu().clone()
        shape = list(tensor.shape)
        for dim, index in plan.tensors.get(name, {}).items():
            shape[dim] = len(index)
        if len(shape) < 2:
            return torch.rand(shape, generator=generator, dtype=dtype) + 0.5
        fan_in = math.prod(shape[1:])
        return torch.randn(shape, generator=generator, dtype=dtype).mul_(max(fan_in, 1) ** -0.5)

    copy = clone_with(model, make).eval()
    for (path, name), values in plan.attributes.items():
        set_attribute(copy.get_submodule(path), name, values)
    for module in copy.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                vars(module)[key] = value.cpu().to(dtype) if value.is_floating_point() else value.cpu()
    return copy


def _is_large_image(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim > 2 and min(tensor.shape[-2:]) > _SIDE


def small_inputs(example: Inputs, dtype: torch.dtype) -> Iterator[Inputs]:
    """Yield the example inputs with large images cut, then whole; constant inputs become random."""
    generator = torch.Generator().manual_seed(1)

    def real(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.detach().cpu()
        if tensor.is_meta or not tensor.numel() or bool((tensor == tensor.flatten()[0]).all()):
            return torch.randn(tensor.shape, generator=generator, dtype=dtype)
        return tensor.detach().cpu().to(dtype)

    whole: Inputs = tree_map_only(Tensor, real, example)
    if any(_is_large_image(t) for t in flat_tensors(whole)):
        yield tree_map_only(Tensor, lambda t: t[..., :_SIDE, :_SIDE] if _is_large_image(t) else t, whole)
    yield whole


@contextlib.contextmanager
def repeatable(calls: Sequence[TracedCall], inputs: Inputs, dtype: torch.dtype) -> Iterator[None]:
    """Compute in one type without gradients, draw nothing at random, and leave the random state as it was."""
    before = torch.get_default_dtype()
    draws = any(_bare_name(call.func) in _NOISE or "dropout" in call.func.overloadpacket.__name__ for call in calls)
    try:
        torch.set_default_dtype(dtype)
        with same_operators(inputs), _NoNoise() if draws else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


class _NoNoise(TorchDispatchMode):
    """Replaces random values by one half: two channels that are exchanged would draw different ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, without noise."""
        kwargs = kwargs or {}
        if "dropout" in func.overloadpacket.__name__ and bind(func, args, kwargs).get("train"):
            return args[0]
        out = func(*args, **kwargs)
        return out.fill_(0.5) if _bare_name(func) in _NOISE and out.is_floating_point() else out


_NOISE = {
    "rand",
    "randn",
    "bernoulli",
    "normal",
    "uniform",
    "exponential",
    "cauchy",
    "geometric",
    "log_normal",
    "poisson",
}
"""Operators that return nothing but random numbers."""


def _bare_name(func: Any) -> str:
    """Return an operator's name without the endings for other forms of it.

    >>> _bare_name(torch.ops.aten.rand_like.default), _bare_name(torch.ops.aten.normal_.default)
    ('rand', 'normal')
    """
    return str(func.overloadpacket.__name__).rstrip("_").removesuffix("_like")
