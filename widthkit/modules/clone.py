"""Copies of a model: on the meta device (no memory, no arithmetic) or with values."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from widthkit.errors import ModelError

TensorMap = Callable[[str, Tensor], Tensor]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer once, by its first name, non-persistent buffers included."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def all_names(model: nn.Module) -> dict[str, list[str]]:
    """Return first name -> all names of every parameter and buffer; shared tensors have several."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    pairs = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in pairs:
        names.setdefault(first.setdefault(id(tensor), name), []).append(name)
    return names


def clone_with(model: nn.Module, make: TensorMap) -> nn.Module:
    """Deep-copy a model, replacing every parameter and buffer by ``make(name, tensor)``.

    The input stays as it is. Shared tensors stay shared. Gradients are not copied.

    Args:
        model: The model to copy.
        make: Gets the first name and the tensor, and returns the tensor of the copy.

    Raises:
        ModelError: If the model cannot be deep-copied.
    """
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            new = make(name, tensor)
            memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    _copy_empty_dicts(model, memo)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); widthkit works on copies, "
            "so make copy.deepcopy(model) work first"
        ) from error


def _copy_empty_dicts(model: nn.Module, memo: dict[int, Any]) -> None:
    """Copy the empty dictionaries of modules, a dozen in each, because ``deepcopy`` is slow on them."""
    for module in model.modules():
        for value in vars(module).values():
            if type(value) in (dict, OrderedDict) and not value:
                memo[id(value)] = type(value)()


def meta_clone(model: nn.Module) -> nn.Module:
    """Copy a model to the meta device, plain tensor attributes of its modules included."""
    clone = clone_with(model, lambda _, t: t.detach().to("meta"))
    for module in clone.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.is_floating_point():
                vars(module)[key] = value.to("meta")
    return clone


def real_clone(model: nn.Module) -> nn.Module:
    """Copy a model with its values."""
    return clone_with(model, lambda _, t: t.detach().clone())
