"""Models built fast, small enough to be run in float64: no initialisation, fewer equal blocks, smaller images."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks.oracles.checks import counted_macs, hollow_outputs, n_params, outputs, relative_error
from widthkit.errors import ModelError
from widthkit.modules.clone import clone_with, meta_clone, real_clone
from widthkit.modules.models import create_model
from widthkit.trace.context import flat_tensors
from widthkit.trace.fake_values import FakeValueMode
from widthkit.trace.inputs import Inputs, likely_inputs, needs_values
from widthkit.trace.recorder import call_model, to_device

SIZES = (64, 96, 128, 192, 224, 256, 288, 384)
_RANDOM = ("normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_uniform_", "erfinv_")
_PERIOD = 4_000_037
"""A prime, so that tensors larger than this do not repeat along a dim."""
_CHAINS = (nn.Sequential, nn.ModuleList)
_PRECISE = 1e-10
"""What outputs of ordinary networks in float64 may differ by."""
_OFFLINE = {"init_weights": False}


class _Uninitialised(TorchFunctionMode):
    """Leaves parameters as they were allocated: their memory is not even touched until somebody fills them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        target = args[0] if args else kwargs.get("tensor")
        if name.endswith("_") and not name.startswith("_") and isinstance(target, nn.Parameter):
            return target.requires_grad_(*args[1:], **kwargs) if name == "requires_grad_" else target
        # Some initialise ``weight.data``, which is a plain tensor.
        return target if name in _RANDOM and isinstance(target, Tensor) else func(*args, **kwargs)


def build(name: str, **kwargs: Any) -> nn.Module:
    """Build a model by name without initialising its parameters."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        # It draws anew until every value is inside its bounds, which never comes true where nothing is drawn.
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
                around = -(-max(0, n - (len(noise) - start)) // len(noise))
                values = torch.cat([noise[start : start + n], *[noise] * around])[:n]
                parameter.copy_(values.reshape(parameter.shape) * float(parameter[0].numel()) ** -0.5)
            elif parameter.is_floating_point():
                parameter.uniform_(0.5, 1.5, generator=generator)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5, generator=generator)
    return model


def runs(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a model runs on these inputs, tried on the meta device.

    Raises:
        ValuesNeeded: If it cannot be told there.
    """
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices=[]), FakeValueMode():
            return bool(flat_tensors((call_model(meta_clone(model), to_device(inputs, "meta")),)))
    except Exception as error:
        if needs_values(error):
            raise ValuesNeeded(str(error)) from error
        return False


def runs_hollow(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a model that takes decisions on values runs on these inputs, with values made up."""
    try:
        return bool(hollow_outputs(model, inputs))
    except Exception:
        return False


class ValuesNeeded(Exception):
    """A model takes decisions on values, which the meta device does not have."""


def shorten(model: nn.Module, keep: int = 2, kinds: tuple[type[nn.Module], ...] = _CHAINS) -> int:
    """Drop children that repeat an earlier one, in modules of some kinds; return how many are gone.

    Of equal siblings (same classes, same shapes of all parameters) ``keep`` remain. A block that keeps its input's
    shape can be left out of a chain, so the rest still runs; callers check that it does.
    """
    dropped = 0
    for module in list(model.modules()):
        if isinstance(module, kinds):
            children = dict(module.named_children())
            kept = [name for name, number in _repeats(children).items() if number < keep]
            if len(kept) < len(children):
                dropped += len(children) - len(kept)
                module._modules.clear()
                module._modules.update({_renamed(n, i): children[n] for i, n in enumerate(kept)})
    return dropped


def _repeats(children: Mapping[str, nn.Module]) -> dict[str, int]:
    """Count for every child how many equal ones come before it (blocks may alternate); without parameters, none."""
    found: dict[str, int] = {}
    seen: dict[Any, int] = {}
    for name, child in children.items():
        signature = _signature(child)
        found[name] = seen.get(signature, 0) if signature[1] else 0
        seen[signature] = found[name] + 1
    return found


def _renamed(name: str, number: int) -> str:
    return str(number) if name.isdigit() else name


def _signature(module: nn.Module) -> tuple[Any, ...]:
    tensors = tuple((n, tuple(t.shape)) for n, t in module.named_parameters())
    return tuple(type(m) for m in module.modules()), tensors


@dataclass(frozen=True)
class Small:
    """A model for numeric checks.

    Args:
        model: Filled; in float64 unless its code mixes in float32.
        inputs: Of the same type.
        how: What was made smaller, in words; empty if nothing.
        tolerance: What sums in another order may differ by.
        full: Whether it is the whole model on its own inputs.
    """

    model: nn.Module
    inputs: Inputs
    how: str
    tolerance: float = _PRECISE
    full: bool = False


def small(name: str, *, macs_limit: float = 4e8, params_limit: float = 3e7) -> Small:
    """Build the smallest version of a model on which its code still runs all the same.

    Args:
        name: As for :func:`widthkit.create_model`.
        macs_limit: Above this many multiply-adds repeated blocks are dropped.
        params_limit: The same for parameters.

    Raises:
        ModelError: If no input was found that the model runs on.
    """
    with contextlib.suppress(ValuesNeeded):
        for size, kwargs in _versions():
            try:
                model = build(name, **kwargs)
            except ModelError:
                continue
            for inputs in likely_inputs(model, sizes=(size,) if size else None):
                if runs(model, inputs):
                    return _shortened(model, inputs, kwargs, macs_limit, params_limit)
    model = fill(build(name))
    for inputs in likely_inputs(model):
        # It depends on values, so nothing can be tried without them.
        for how, tolerance in (("float64", 1e-8), ("float32, which its code insists on", 1e-3)):
            dtype = getattr(torch, how[:7])
            with contextlib.suppress(Exception):
                typed = _typed(inputs, dtype)
                outputs(model.to(dtype), typed)
                return Small(model, typed, f"whole, {how}", tolerance=tolerance, full=True)
    raise ModelError(f"{name}: no example input was found at any size")


def _versions() -> Iterator[tuple[int | None, dict[str, Any]]]:
    yield 64, {}
    for size in SIZES[:3]:
        yield size, {"img_size": size}
        yield size, {"min_size": size, "max_size": size}
    for size in SIZES[1:]:
        yield size, {}
    yield None, {}


def _shortened(
    model: nn.Module, inputs: Inputs, kwargs: Mapping[str, Any], macs_limit: float, params_limit: float
) -> Small:
    how = [f"{k}={v}" for k, v in kwargs.items()]
    gone = 0
    for keep, kinds in ((2, _CHAINS), (2, (nn.Module,)), (1, _CHAINS), (1, (nn.Module,))):
        # Some run through all their children without being a sequence; where that is not so, the shortened one fails.
        if n_params(model) <= params_limit and _macs(model, inputs) <= macs_limit:
            break
        short = build_again(model)
        dropped = shorten(short, keep, kinds)
        if dropped and runs(short, inputs):
            model, gone = short, gone + dropped
    if gone:
        how.append(f"{gone} repeated blocks fewer")
    fill(model)
    real = _typed(inputs, torch.float64)
    precise = meta_clone(model).double()
    if runs(precise, real):
        if not _casts(precise, to_device(real, "meta")):
            scale, tolerance = _calmed(model.double(), real)
            if scale < 1:
                how.append(f"weights at {scale:.1f}x, so that rounding errors do not grow")
            if tolerance > _PRECISE:
                how.append(f"compared at {tolerance:.0e}, since rounding of its weights alone changes as much")
            return Small(model, real, ", ".join(how), tolerance=tolerance)
        return Small(model.double(), real, ", ".join([*how, "computes parts in float32"]), tolerance=1e-4)
    return Small(model, inputs, ", ".join([*how, "float32, which its code insists on"]), tolerance=1e-3)


def _typed(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Return inputs whose floating-point tensors have another type."""
    typed: Inputs = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)
    return typed


def _calmed(model: nn.Module, inputs: Inputs) -> tuple[float, float]:
    """Make weights smaller, in place, where errors of rounding grow, if that helps; return by how much."""
    matrices = [p for p in model.parameters() if p.ndim > 1 and p.is_floating_point()]
    first = _tolerance(model, inputs)
    if first <= _PRECISE:
        return 1.0, first
    as_they_were = [p.detach().clone() for p in matrices]
    for scale in (0.9, 0.8, 0.7):
        _set_scaled(matrices, as_they_were, scale)
        if _tolerance(model, inputs) <= _PRECISE:
            return scale, _PRECISE
    _set_scaled(matrices, as_they_were, 1.0)
    return 1.0, first


def _set_scaled(parameters: list[nn.Parameter], values: list[Tensor], scale: float) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value * scale)


def _tolerance(model: nn.Module, inputs: Inputs) -> float:
    """Return what reordered sums may change: far more where features are multiplied with each other (StarNet)."""
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
    return min(max(_PRECISE, 30 * max(changes, default=0.0)), 1e-3)


class _Casts(TorchDispatchMode):
    """Notes whether anything in float64 becomes less precise."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        precise = any(t.dtype == torch.float64 for t in flat_tensors(args))
        self.found |= precise and any(t.dtype in _COARSE for t in flat_tensors((out,)))
        return out


_COARSE = (torch.float32, torch.float16, torch.bfloat16)


def _casts(model: nn.Module, inputs: Inputs) -> bool:
    with torch.inference_mode(), torch.random.fork_rng(devices=[]), _Casts() as casts:
        call_model(model, inputs)
    return bool(casts.found)


def build_again(model: nn.Module) -> nn.Module:
    """Return a copy whose containers may be changed; parameters are shared with the original."""
    return clone_with(model, lambda _, t: t.detach())


def _macs(model: nn.Module, inputs: Inputs) -> float:
    return float(counted_macs(meta_clone(model), to_device(inputs, "meta")))
