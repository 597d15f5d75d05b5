"""Versions of models that are small enough for float64: smaller images, fewer equal blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from benchmarks.oracles import TOLERANCE, counted_macs, n_params, outputs
from benchmarks.zoo.build import ValuesNeededError, build, fill, runs
from benchmarks.zoo.precision import casts_down, tame
from widthkit.errors import ModelError
from widthkit.modules.clone import clone_with, meta_clone
from widthkit.trace.inputs import Inputs, likely_inputs
from widthkit.trace.recorder import to_device

SIZES = (64, 96, 128, 192, 224, 256, 288, 384)
"""Side lengths of images to try."""
_CHAINS = (nn.Sequential, nn.ModuleList)


@dataclass(frozen=True)
class Small:
    """A model for numeric checks.

    Args:
        model: Filled; in float64 unless its code mixes in float32.
        inputs: Of the same type.
        how: What was made smaller, in words; empty if nothing.
        tolerance: How much sums in another order may change the outputs.
        full: Whether it is the whole model on its own inputs.
    """

    model: nn.Module
    inputs: Inputs
    how: str
    tolerance: float = TOLERANCE
    full: bool = False


def small(name: str, *, macs_limit: float = 4e8, params_limit: float = 3e7) -> Small:
    """Build the smallest version of a model that still runs the same code.

    Args:
        name: As for :func:`widthkit.create_model`.
        macs_limit: Above this many multiply-adds repeated blocks are dropped.
        params_limit: The same for parameters.

    Raises:
        ModelError: If no input was found that the model runs on.
    """
    with contextlib.suppress(ValuesNeededError):
        for size, kwargs in _versions():
            try:
                model = build(name, **kwargs)
            except ModelError:
                continue
            for inputs in likely_inputs(model, sizes=(size,) if size else None):
                if runs(model, inputs):
                    return _shortened(model, inputs, kwargs, macs_limit, params_limit)
    # Its control flow depends on values, so sizes cannot be tried on the meta device.
    model = fill(build(name))
    for inputs in likely_inputs(model):
        for how, tolerance in (("float64", 1e-8), ("float32, which its code insists on", 1e-3)):
            dtype = getattr(torch, how[:7])
            with contextlib.suppress(Exception):
                typed = _typed(inputs, dtype)
                outputs(model.to(dtype), typed)
                return Small(model, typed, f"whole, {how}", tolerance=tolerance, full=True)
    raise ModelError(f"{name}: no example input was found at any size")


def _versions() -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Yield image sizes and arguments of the factory, smallest first."""
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
    """Drop repeated blocks of a large model, fill it, and choose its type and tolerance."""
    how = [f"{k}={v}" for k, v in kwargs.items()]
    dropped = 0
    for keep, kinds in ((2, _CHAINS), (2, (nn.Module,)), (1, _CHAINS), (1, (nn.Module,))):
        # Some modules run through all their children without being a sequence; if not, the shortened model fails.
        if n_params(model) <= params_limit and _macs(model, inputs) <= macs_limit:
            break
        short = _with_own_containers(model)
        fewer = shorten(short, keep, kinds)
        if fewer and runs(short, inputs):
            model, dropped = short, dropped + fewer
    if dropped:
        how.append(f"{dropped} repeated blocks fewer")
    fill(model)
    real = _typed(inputs, torch.float64)
    precise = meta_clone(model).double()
    if not runs(precise, real):
        return Small(model, inputs, ", ".join([*how, "float32, which its code insists on"]), tolerance=1e-3)
    if casts_down(precise, to_device(real, "meta")):
        return Small(model.double(), real, ", ".join([*how, "computes parts in float32"]), tolerance=1e-4)
    scale, tolerance = tame(model.double(), real)
    if scale < 1:
        how.append(f"weights at {scale:.1f}x, so that rounding errors do not grow")
    if tolerance > TOLERANCE:
        how.append(f"compared at {tolerance:.0e}, since rounding of its weights alone changes as much")
    return Small(model, real, ", ".join(how), tolerance=tolerance)


def shorten(model: nn.Module, keep: int = 2, kinds: tuple[type[nn.Module], ...] = _CHAINS) -> int:
    """Drop children that repeat an earlier one, in place; return how many are gone.

    A block that keeps its input's shape can be left out of a chain, and the rest still runs; callers check that.

    Args:
        model: The model.
        keep: Equal siblings (same classes, same shapes of all parameters) that remain.
        kinds: Modules whose children may go.
    """
    dropped = 0
    for module in list(model.modules()):
        if isinstance(module, kinds):
            children = dict(module.named_children())
            kept = [name for name, number in _repeats(children).items() if number < keep]
            if len(kept) < len(children):
                dropped += len(children) - len(kept)
                for name in children:
                    if name not in kept or name.isdigit():
                        delattr(module, name)
                for number, name in enumerate(kept):
                    if name.isdigit():
                        module.add_module(str(number), children[name])
    return dropped


def _repeats(children: Mapping[str, nn.Module]) -> dict[str, int]:
    """Count for every child the equal ones before it (blocks may alternate); children without parameters count 0."""
    found: dict[str, int] = {}
    seen: dict[Any, int] = {}
    for name, child in children.items():
        signature = _signature(child)
        found[name] = seen.get(signature, 0) if signature[1] else 0
        seen[signature] = found[name] + 1
    return found


def _signature(module: nn.Module) -> tuple[Any, ...]:
    tensors = tuple((n, tuple(t.shape)) for n, t in module.named_parameters())
    return tuple(type(m) for m in module.modules()), tensors


def _with_own_containers(model: nn.Module) -> nn.Module:
    """Return a copy whose modules may be changed; it shares the parameters."""
    return clone_with(model, lambda _, t: t.detach())


def _typed(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Return inputs whose floating-point tensors have another type."""
    typed: Inputs = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)
    return typed


def _macs(model: nn.Module, inputs: Inputs) -> float:
    return float(counted_macs(meta_clone(model), to_device(inputs, "meta")))
