"""Blocks with several branches that merge into one layer: train the branches, ship the layer.

A block says how it merges by ``fuse()`` (returns the merged module), ``reparameterize()`` or ``switch_to_deploy()``
(change it in place), as timm's :func:`~timm.utils.reparameterize_model` expects: timm's own (RepVGG, MobileOne,
FastViT...), those of :mod:`widthkit.modules.blocks`, and yours.
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

    ``path`` may be one of the merged network, which the model does not have.
    """
    modules = dict(model.named_modules())
    parts = path.split(".") if path else []
    for end in range(len(parts), 0, -1):
        candidate = ".".join(parts[:end])
        if candidate in modules and merges(modules[candidate]):
            return candidate
    return None


def merge(model: nn.Module) -> nn.Module:
    """Return a copy in which every block is merged, in eval mode: it computes what the model does in eval mode.

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
    # The walk looks at children only, so the model itself becomes one.
    outer = nn.Sequential(real_clone(model).eval())
    hollow = any(p.is_meta for p in model.parameters())
    for block in [m for m in outer.modules() if merges(m)] if hollow else []:
        # Its weights have no values; then what stands beside them needs none either.
        block.to("meta")
    try:
        with torch.no_grad():
            reparameterize_model(outer, inplace=True)
    except Exception as error:
        raise ModelError(f"{type(model).__name__} cannot be merged: {type(error).__name__}: {error}") from error
    merged: nn.Module = outer[0]
    # A block made new layers, in torch's default precision and on the CPU.
    first = next(model.parameters())
    if hollow:
        merged.to(first.dtype)
    else:
        merged.to(first.device, first.dtype)
    merged.requires_grad_(True)
    return merged.eval()
