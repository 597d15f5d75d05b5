"""How precisely the outputs of a model in float64 can be compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.oracles import TOLERANCE, outputs, relative_error
from widthkit.modules.clone import real_clone
from widthkit.trace.context import flat_tensors
from widthkit.trace.inputs import Inputs
from widthkit.trace.recorder import call_model

_COARSE = (torch.float32, torch.float16, torch.bfloat16)
_SCALES = (0.9, 0.8, 0.7)
_MARGIN = 30
"""Outputs may differ by this many times the change that rounding the weights causes."""
_LEAST_PRECISE = 1e-3


def tame(model: nn.Module, inputs: Inputs) -> tuple[float, float]:
    """Make weights smaller, in place, if rounding errors grow in the model and smaller weights stop that.

    Returns:
        The scale of the weights, and the tolerance to compare outputs with.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1 and p.is_floating_point()]
    first = tolerance_of(model, inputs)
    if first <= TOLERANCE:
        return 1.0, first
    before = [p.detach().clone() for p in matrices]
    for scale in _SCALES:
        _set_scaled(matrices, before, scale)
        if tolerance_of(model, inputs) <= TOLERANCE:
            return scale, TOLERANCE
    _set_scaled(matrices, before, 1.0)
    return 1.0, first


def _set_scaled(parameters: list[nn.Parameter], values: list[Tensor], scale: float) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value * scale)


def tolerance_of(model: nn.Module, inputs: Inputs) -> float:
    """Return how much sums in another order may change the outputs, measured by rounding every weight up or down.

    This is far above 1e-10 where features are multiplied with each other (StarNet).
    """
    expected = outputs(model, inputs)
    rounded = real_clone(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.is_floating_point():
                signs = torch.randint(-1, 2, parameter.shape, generator=generator)
                parameter.mul_(1 + torch.finfo(torch.float64).eps * signs.double())
    found = outputs(rounded, inputs)
    changes = [
        relative_error(a, e) for a, e in zip(found, expected, strict=True) if e.is_floating_point() and e.numel()
    ]
    return min(max(TOLERANCE, _MARGIN * max(changes, default=0.0)), _LEAST_PRECISE)


def casts_down(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a run turns anything in float64 into a less precise type."""
    with torch.inference_mode(), torch.random.fork_rng(devices=[]), _Casts() as casts:
        call_model(model, inputs)
    return bool(casts.found)


class _Casts(TorchDispatchMode):
    """Records whether an operator reads float64 and returns a less precise type."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        precise = any(t.dtype == torch.float64 for t in flat_tensors(args))
        self.found |= precise and any(t.dtype in _COARSE for t in flat_tensors((out,)))
        return out
