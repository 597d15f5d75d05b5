"""Initial values of channels that a plan adds."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from widthkit.graph.arrays import IntArray


def initialise_new(model: nn.Module, tensors: Mapping[str, Mapping[int, IntArray]], seed: int) -> None:
    """Give new entries what the module's own ``reset_parameters`` draws, else values drawn from the old entries.

    Args:
        model: Changed in place; tensors on the meta device are skipped.
        tensors: Tensor name -> dim -> indices along that dim; -1 is a new entry.
        seed: Seeds the values; the global random state stays as it was.
    """
    owners = {f"{path}.{key}" if path else key: (m, key) for path, m in model.named_modules() for key in _own(m)}
    generator = torch.Generator().manual_seed(seed)
    for name, dims in tensors.items():
        if not any((index < 0).any() for index in dims.values()):
            continue
        module, key = owners[name]
        tensor = getattr(module, key)
        if tensor.device.type == "meta":
            continue
        old = torch.ones((), dtype=torch.bool)
        for dim, index in dims.items():
            shape = [1] * tensor.ndim
            shape[dim] = -1
            old = old & torch.from_numpy(index >= 0).reshape(shape)
        fresh = _fresh(module, key, old, generator)
        with torch.no_grad():
            tensor.copy_(torch.where(old.to(tensor.device), tensor, fresh.to(tensor)))


def _own(module: nn.Module) -> list[str]:
    tensors = (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    return [name for named in tensors for name, _ in named]


def _fresh(module: nn.Module, key: str, old: Tensor, generator: torch.Generator) -> Tensor:
    """Return a tensor of the shape of ``module.key`` with values for its new entries; ``old`` marks the others."""
    tensor: Tensor = getattr(module, key)
    reset = getattr(module, "reset_parameters", None)
    if callable(reset) and not any(list(child.parameters()) for child in module.children()):
        twin = copy.deepcopy(module).cpu()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
            twin.reset_parameters()  # type: ignore[operator]
        value: Tensor = getattr(twin, key).detach()
        return value
    # Values of old entries suit the tensor: a running variance stays positive, a layer scale stays small.
    values = tensor.detach().cpu()[old.expand(tensor.shape)]
    return values[torch.randint(len(values), tensor.shape, generator=generator)]
