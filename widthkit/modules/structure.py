"""A model's structure as text: it tells models apart whose tensors have the same shapes."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Structure = tuple[tuple[str, str, str], ...]


def structure(model: nn.Module) -> Structure:
    """List ``(path, class, settings)`` of every module: strides, paddings, activations and the like."""
    return tuple(
        (path, f"{type(m).__module__}.{type(m).__qualname__}", m.extra_repr()) for path, m in model.named_modules()
    )


def structure_hash(model_structure: Structure) -> str:
    """SHA-256 of a structure, in hex."""
    return hashlib.sha256(json.dumps(model_structure).encode()).hexdigest()


def state_hash(model: nn.Module) -> str:
    """SHA-256 of a model's structure and of all values in its state, in hex."""
    digest = hashlib.sha256(structure_hash(structure(model)).encode())
    for name, value in model.state_dict().items():
        is_tensor = isinstance(value, Tensor)
        digest.update(f"{name} {tuple(value.shape) if is_tensor else value!r}".encode())
        if is_tensor:
            digest.update(tensor_bytes(value))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the values of a tensor as bytes, in order of their indices."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def plain_attributes(model: nn.Module) -> dict[tuple[str, str], str]:
    """Return the attributes that a module's forward may read: flags, rates, sizes and functions."""
    return {
        (path, key): getattr(value, "__qualname__", None) or repr(value)
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if not key.startswith("_") and key != "training" and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str)) or inspect.isroutine(value)


def architecture(model: nn.Module) -> str | None:
    """Return the name that timm built a model under, if timm did."""
    name = _timm_entry(model, "architecture")
    return name if isinstance(name, str) else None


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of a model's classifiers: those that timm names, else the last linear or 2-D convolution.

    >>> classifiers(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8, 2), nn.Softmax(1)))
    ('2',)
    """
    named = _timm_entry(model, "classifier")
    if isinstance(named, str):
        return (named,)
    if isinstance(named, (tuple, list)):
        return tuple(named)
    return tuple(path for path, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)))[-1:]


def _timm_entry(model: nn.Module, key: str) -> Any:
    """Return an entry of the configuration that timm stores with a model; ``None`` without one."""
    cfg: Any = getattr(model, "pretrained_cfg", None)
    return cfg.get(key) if isinstance(cfg, dict) else getattr(cfg, key, None)


def remember_image_size(model: nn.Module, size: int | None) -> None:
    """Store the side length of images that a model was designed for; timm's models have it in their metadata."""
    if size is not None:
        model.__dict__["_widthkit_image_size"] = size


def image_size(model: nn.Module) -> int | None:
    """Return the side length of images that a model was designed for; ``None`` where nothing says so."""
    for name in ("_widthkit_image_size", "image_size"):
        size = getattr(model, name, None)
        if isinstance(size, int):
            return size
    return None


@dataclass(frozen=True)
class Dense:
    """What identifies a dense model.

    Args:
        structure: Its modules with their settings.
        attributes: The plain attributes of its modules.
        architecture: The name that timm built it under, if timm did.
    """

    structure: Structure
    attributes: Mapping[tuple[str, str], str]
    architecture: str | None

    @classmethod
    def of(cls, model: nn.Module) -> Dense:
        """Describe a model."""
        return cls(structure(model), plain_attributes(model), architecture(model))
