"""Example inputs: given by the user, read from the model's metadata, or found by trying."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from widthkit.errors import ModelError
from widthkit.modules.structure import image_size

Inputs = tuple[Any, ...]


class Keywords(dict[str, Any]):
    """Arguments that are passed by name. A plain dict among the inputs is one argument."""


register_pytree_node(Keywords, lambda k: (list(k.values()), list(k)), lambda v, k: Keywords(zip(k, v, strict=True)))
_CONVS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


def as_inputs(example: Any, dtype: torch.dtype = torch.float32) -> Inputs:
    """Turn what a user may pass (tensor, shape, tuple of arguments, mapping of keyword arguments) into a tuple.

    Args:
        example: What the user passed.
        dtype: Type of the random tensor that replaces a shape.

    Raises:
        ModelError: If it is none of these.

    >>> as_inputs((1, 3, 32, 32))[0].shape
    torch.Size([1, 3, 32, 32])
    """
    if isinstance(example, Tensor):
        return (example,)
    if isinstance(example, Mapping):
        return (Keywords(example),)
    if isinstance(example, (tuple, list)) and example and all(isinstance(n, int) for n in example):
        return (_random(tuple(example), dtype),)
    if isinstance(example, (tuple, list)) and example:
        return tuple(example)
    raise ModelError(f"example_inputs must be a tensor, a shape, a tuple of arguments or a mapping, not {example!r}")


def likely_inputs(model: nn.Module, sizes: Sequence[int] | None = None) -> Iterator[Inputs]:
    """Yield example inputs to try, likeliest first: sizes from the model's own metadata, then common image sizes.

    A forward with two required arguments gets two images (optical flow). With one it gets an image batch first, then a
    list of images (detection).

    Args:
        model: The model to run.
        sizes: Side lengths of images to try instead.
    """
    shapes = list(dict.fromkeys(_shapes(model) if sizes is None else _sized(model, sizes)))
    dtype = float_dtype(model)
    n = _n_required(model)
    for shape in shapes:
        yield tuple(_random(shape, dtype, seed) for seed in range(n))
    for shape in shapes if n == 1 else []:
        if len(shape) == 4:
            yield ([_random(shape[1:], dtype)],)


def needs_values(error: Exception) -> bool:
    """Whether a run on the meta device failed because the model reads values; other input sizes would fail, too."""
    return "meta tensor" in str(error) or (isinstance(error, NotImplementedError) and "meta" in str(error).lower())


def _n_required(model: nn.Module) -> int:
    """Return how many arguments a model requires; one where its signature does not tell."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters))


def float_dtype(model: nn.Module) -> torch.dtype:
    """Return the type of the first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _sized(model: nn.Module, sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    channels, spatial = _stem(model)
    for size in sizes:
        if spatial == 3:
            yield (1, channels, 8, size, size)
            yield (1, channels, 16, size, size)
        else:
            yield (1, channels, *(size,) * spatial)
            yield (1, 3, size, size)


def _shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    channels, spatial = _stem(model)
    for name in ("pretrained_cfg", "default_cfg"):
        cfg = getattr(model, name, None)
        size = cfg.get("input_size") if isinstance(cfg, Mapping) else getattr(cfg, "input_size", None)
        if size is not None and len(size) == 3:
            yield (1, channels if spatial == 2 else size[0], *size[1:])
            yield (1, *size)
    if spatial == 3:
        side = image_size(model) or 112
        yield (1, channels, 16, side, side)
        yield (1, channels, 16, 224, 224)
        yield (1, channels, 8, 32, 32)
    elif spatial == 1:
        yield (1, channels, 1024)
    else:
        designed = image_size(model)
        if designed is not None:
            yield (1, channels, designed, designed)
        for size in (224, 256, 299, 384, 64, 32):
            yield (1, channels, size, size)


def _stem(model: nn.Module) -> tuple[int, int]:
    """Return input channels and spatial dims of the first convolution; three and two when there is none."""
    for module in model.modules():
        for kind, spatial in _CONVS.items():
            if isinstance(module, kind):
                return module.in_channels, spatial
    return 3, 2


def batch_size(inputs: Inputs) -> int:
    """Return dim 0 of the first tensor, or the length of a list of images."""
    for value in inputs[0].values() if isinstance(inputs[0], dict) else inputs:
        if isinstance(value, Tensor) and value.ndim:
            return int(value.shape[0])
        if isinstance(value, (list, tuple)) and value:
            return len(value)
    return 1
