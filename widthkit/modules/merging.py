"""Blocks with several branches that merge into one layer: train the branches, export the layer.

A block merges by ``fuse()``, which returns the merged module, or by ``reparameterize()`` or ``switch_to_deploy()``,
which change it in place. timm's :func:`~timm.utils.reparameterize_model` calls these methods. timm's own blocks have
them (RepVGG, MobileOne, FastViT...), and so do those of :mod:`widthkit.modules.blocks`.
"""

from __future__ import annotations

import torch
from timm.utils import reparameterize_model
from torch import nn

from widthkit.errors import ModelError
from widthkit.modules.clone import real_clone

_METHODS = ("fuse", "reparameterize", "switch_to_deploy")


def merges(module: nn.Module) -> bool:
    """Whether a module is a block that merges."""
    return any(callable(getattr(module, method, None)) for method in _METHODS)


def merging_module(model: nn.Module, path: str) -> str | None:
    """Return the path of the innermost block that merges and holds ``path``, or ``None``.

    ``path`` may belong to the merged network and be missing from the model.
    """
    modules = dict(model.named_modules())
    parts = path.split(".") if path else []
    for end in range(len(parts), 0, -1):
        candidate = ".".join(parts[:end])
        if candidate in modules and merges(modules[candidate]):
            return candidate
    return None


def merge(model: nn.Module) -> nn.Module:
    """Return a copy with every block merged, in eval mode; it computes what the model computes in eval mode.

    Raises:
        ModelError: If there is nothing to merge, or a block cannot be.

    >>> from widthkit.modules.blocks import ResidualConv
    >>> net = nn.Sequential(ResidualConv(3, 8, 3), ResidualConv(8, 8, 3)).eval()
    >>> x = torch.randn(1, 3, 6, 6)
    >>> torch.allclose(merge(net)(x), net(x), atol=1e-5)
    True
    """
    if not any(merges(module) for module in model.modules()):
        raise ModelError(f"{type(model).__name__} has no block with fuse(), reparameterize() or switch_to_deploy()")
    # reparameterize_model visits children only, so the model itself must be a child.
    outer = nn.Sequential(real_clone(model).eval())
    on_meta = any(p.is_meta for p in model.parameters())
    for block in [m for m in outer.modules() if merges(m)] if on_meta else []:
        # Its weights are on the meta device, so its other tensors move there, too.
        block.to("meta")
    try:
        with torch.no_grad():
            reparameterize_model(outer, inplace=True)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be merged ({type(error).__name__}: {error}); correct the method that "
            "merges its blocks, or build it without merged=True"
        ) from error
    merged: nn.Module = outer[0]
    # Merging makes new layers in torch's default precision, on the CPU.
    first = next(model.parameters())
    if on_meta:
        merged.to(first.dtype)
    else:
        merged.to(first.device, first.dtype)
    merged.requires_grad_(True)
    return merged.eval()
