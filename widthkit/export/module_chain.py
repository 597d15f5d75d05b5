"""Find the chain of modules in a network: modules that run one after another, each on the output of the one before.

The chain is observed in one run, not read from the code: module ``b`` follows ``a`` if ``b`` is called with the very
tensor that ``a`` returned. Sequential containers are opened; any other module is one link. The chain ends where the
forward pass itself computes something between two modules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from widthkit.errors import ModelError
from widthkit.export.check import call_arguments, outputs, usable_inputs
from widthkit.train.modes import model_device, training_flags

_FIXED_SIZE_POOLING = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
"""Pooling whose output size does not depend on the image belongs to the head."""
_LARGEST_STRIDE_DIFFERENCE = 0.4
"""In powers of two. Odd sides are rounded up, so height and width may differ slightly in their quotients."""


@dataclass
class _ModuleCall:
    """One call of a module: its only tensor argument, its result, a copy of the result, the calls inside it."""

    path: str
    module: nn.Module
    argument: Tensor | None
    result: Any = None
    value: Tensor | None = None
    children: list[_ModuleCall] = field(default_factory=list)


@dataclass(frozen=True)
class Link:
    """One module of a chain.

    Args:
        path: Path of the module.
        module: The module.
        shape: Shape of its result on the example input.
        is_map: Whether the result is a feature map with channels first.
    """

    path: str
    module: nn.Module
    shape: tuple[int, ...]
    is_map: bool


def find_module_chain(net: nn.Module, example_inputs: Any = None) -> tuple[list[Link], tuple[int, int]]:
    """Return the chain up to its last feature map, and the height and width of the image.

    Raises:
        ModelError: If the network does not take one batch of images, or most of its layers lie outside the chain.
    """
    inputs = usable_inputs(net, example_inputs)
    args, _ = call_arguments(inputs)
    if len(args) != 1 or not isinstance(args[0], Tensor) or args[0].ndim != 4:
        raise ModelError("a backbone takes one batch of images; pass example_inputs=(1, 3, height, width)")
    root = _record_calls(net, inputs)
    image = args[0].to(model_device(net))
    calls = _chain(root.children, image if root.argument is None else root.argument)
    size = (int(image.shape[2]), int(image.shape[3]))
    while calls and not _is_map(calls[-1].value, size):
        calls.pop()
    links = [Link(c.path, c.module, tuple(c.value.shape), _is_map(c.value, size)) for c in calls if c.value is not None]
    links = links[: _n_reproduced(net, links, image, [c.value for c in calls if c.value is not None])]
    _refuse_short_chain(net, links)
    return links, size


def _record_calls(net: nn.Module, inputs: Any) -> _ModuleCall:
    """Run the network once and return the tree of its module calls."""
    root = _ModuleCall("", net, None)
    stack = [root]
    hooks = []

    def enter(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = root if module is net else _ModuleCall(path, module, None)
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            call.argument = tensors[0] if len(tensors) == 1 else None
            if module is not net:
                stack[-1].children.append(call)
            stack.append(call)

        return hook

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        call = stack.pop()
        call.result = result
        call.value = result.detach().clone() if isinstance(result, Tensor) else None

    try:
        for path, module in net.named_modules():
            hooks.append(module.register_forward_pre_hook(enter(path), with_kwargs=True))
            hooks.append(module.register_forward_hook(leave))
        outputs(net, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return root


def _chain(calls: list[_ModuleCall], start: Tensor) -> list[_ModuleCall]:
    """Follow a tensor from call to call; replace sequential containers by the calls inside them."""
    found: list[_ModuleCall] = []
    current = start
    for call in calls:
        is_next = call.argument is current and isinstance(call.result, Tensor)
        if not is_next or isinstance(call.module, _FIXED_SIZE_POOLING):
            break
        opened = _chain(call.children, current) if isinstance(call.module, nn.Sequential) else []
        found += opened if opened and opened[-1].result is call.result else [call]
        current = call.result
    return found


def _is_map(value: Tensor | None, image: tuple[int, int]) -> bool:
    """Whether a result is a feature map with channels first: one stride divides both sides of the image."""
    if value is None or value.ndim != 4 or value.shape[2] * value.shape[3] <= 1:
        return False
    strides = math.log2(image[0] / value.shape[2]), math.log2(image[1] / value.shape[3])
    return abs(strides[0] - strides[1]) < _LARGEST_STRIDE_DIFFERENCE


def _refuse_short_chain(net: nn.Module, links: list[Link]) -> None:
    inside = {id(m) for link in links for m in link.module.modules()}
    layers = [m for m in net.modules() if any(True for _ in m.parameters(recurse=False))]
    held = sum(id(m) in inside for m in layers)
    if not links or 2 * held < len(layers):
        raise ModelError(
            f"{type(net).__name__} has no chain of feature maps (only {held} of {len(layers)} layers run one after "
            "another on maps with channels first); use the feature extractor of the network's own library"
        )


def _n_reproduced(net: nn.Module, links: list[Link], image: Tensor, expected: list[Tensor]) -> int:
    """Return how many links compute the same outside the network as they computed inside it.

    An operation in place between two modules changes a tensor that stays the same object; only its values show that.
    """
    with training_flags(net), torch.no_grad():
        net.eval()
        current = image
        for i, (link, value) in enumerate(zip(links, expected, strict=True)):
            current = link.module(current)
            if not torch.equal(current, value):
                return i
    return len(links)
