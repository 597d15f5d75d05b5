"""Build models fast: no initialisation by the library, random values instead."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.oracles import fake_outputs
from widthkit.modules.clone import meta_clone
from widthkit.modules.models import create_model
from widthkit.trace.context import flat_tensors
from widthkit.trace.fake_values import FakeValueMode
from widthkit.trace.inputs import Inputs, needs_values
from widthkit.trace.recorder import call_model, to_device

_RANDOM = ("normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_uniform_", "erfinv_")
_PERIOD = 4_000_037
"""A prime, so that larger tensors do not repeat along a dim."""


class _Uninitialised(TorchFunctionMode):
    """Leave parameters as they were allocated; their memory is not touched before somebody fills them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        target = args[0] if args else kwargs.get("tensor")
        if name.endswith("_") and not name.startswith("_") and isinstance(target, nn.Parameter):
            return target.requires_grad_(*args[1:], **kwargs) if name == "requires_grad_" else target
        # Some models initialise ``weight.data``, which is a plain tensor.
        return target if name in _RANDOM and isinstance(target, Tensor) else func(*args, **kwargs)


def build(name: str, **kwargs: Any) -> nn.Module:
    """Build a model by name without initialising its parameters."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        # torch's truncated normal draws until every value is inside its bounds: without drawing, it would never end.
        loop = mock.patch.object(nn.init, "_no_grad_trunc_normal_", lambda tensor, *_, **__: tensor, create=True)
        with _Uninitialised(), loop:
            return create_model(name, **kwargs).eval()


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give all parameters values that tell channels apart and keep activations of moderate size."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(min(_PERIOD, max((p.numel() for p in model.parameters()), default=0)), generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.is_floating_point():
                n = parameter.numel()
                start = int(torch.randint(len(noise), (), generator=generator))
                repeats = -(-max(0, n - (len(noise) - start)) // len(noise))
                values = torch.cat([noise[start : start + n], *[noise] * repeats])[:n]
                parameter.copy_(values.reshape(parameter.shape) * float(parameter[0].numel()) ** -0.5)
            elif parameter.is_floating_point():
                parameter.uniform_(0.5, 1.5, generator=generator)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5, generator=generator)
    return model


class ValuesNeededError(Exception):
    """A model's control flow depends on values, which the meta device does not have."""


def runs(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a model runs on these inputs, tried on the meta device.

    Raises:
        ValuesNeededError: If the meta device cannot tell.
    """
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices=[]), FakeValueMode():
            return bool(flat_tensors((call_model(meta_clone(model), to_device(inputs, "meta")),)))
    except Exception as error:
        if needs_values(error):
            raise ValuesNeededError(str(error)) from error
        return False


def runs_with_fake_values(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a model whose control flow depends on values runs on these inputs, computed with fake values."""
    try:
        return bool(fake_outputs(model, inputs))
    except Exception:
        return False
