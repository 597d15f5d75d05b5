"""A model's structure as text: what tells two models apart although their tensors have equal shapes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import nn

Structure = tuple[tuple[str, str, str], ...]


def structure(model: nn.Module) -> Structure:
    """List ``(path, class, settings)`` of every module: strides, paddings, activations and the like."""
    return tuple(
        (path, f"{type(m).__module__}.{type(m).__qualname__}", m.extra_repr()) for path, m in model.named_modules()
    )


def structure_hash(model_structure: Structure) -> str:
    """SHA-256 of a structure, in hex."""
    return hashlib.sha256(json.dumps(model_structure).encode()).hexdigest()


def architecture(model: nn.Module) -> str | None:
    """Return the name that timm built a model under, if timm did."""
    cfg: Any = getattr(model, "pretrained_cfg", None)
    name = cfg.get("architecture") if isinstance(cfg, dict) else getattr(cfg, "architecture", None)
    return name if isinstance(name, str) else None
