"""The trunk of a network: the modules that run one after another, each on what the one before gave.

Watched in one run, not read off the code: module ``b`` follows ``a`` if it was called with the very tensor that ``a``
returned. Sequential containers are opened, anything else is one link. What the forward pass does between two modules
ends the trunk there.
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
from widthkit.train.modes import training_flags

_TO_FIXED_SIZE = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
"""Pooling to a size that does not depend on the image's belongs to the head."""


@dataclass
class _Call:
    """One call of a module: its argument, its result, a copy of the result, and the calls below it."""

    path: str
    module: nn.Module
    given: Any
    result: Any = None
    value: Tensor | None = None
    below: list[_Call] = field(default_factory=list)


@dataclass(frozen=True)
class Link:
    """One module of a trunk.

    Args:
        path: Where the module is.
        module: The module.
        shape: Of its result on the example input.
        is_map: Whether that is a feature map, channels first.
    """

    path: str
    module: nn.Module
    shape: tuple[int, ...]
    is_map: bool


def find_trunk(net: nn.Module, example_inputs: Any = None) -> tuple[list[Link], tuple[int, int]]:
    """Return the trunk as far as it gives feature maps, and the image's height and width.

    Raises:
        ModelError: If most of the network's layers lie outside the trunk.
    """
    inputs = usable_inputs(net, example_inputs)
    args, _ = call_arguments(inputs)
    if len(args) != 1 or not isinstance(args[0], Tensor) or args[0].ndim != 4:
        raise ModelError("a backbone takes one batch of images; pass example_inputs=(1, 3, height, width)")
    root = _watch(net, inputs)
    image = args[0].to(next((p.device for p in net.parameters()), torch.device("cpu")))
    calls = _chain(root.below, image if root.given is None else root.given)
    size = (int(image.shape[2]), int(image.shape[3]))
    while calls and not _is_map(calls[-1].value, size):
        calls.pop()
    links = [Link(c.path, c.module, tuple(c.value.shape), _is_map(c.value, size)) for c in calls if c.value is not None]
    links = links[: _verified(net, links, image, [c.value for c in calls if c.value is not None])]
    _check(net, links)
    return links, size


def _watch(net: nn.Module, inputs: Any) -> _Call:
    root = _Call("", net, None)
    stack = [root]
    hooks = []

    def enter(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = root if module is net else _Call(path, module, None)
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            call.given = tensors[0] if len(tensors) == 1 else None
            if module is not net:
                stack[-1].below.append(call)
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


def _chain(calls: list[_Call], start: Tensor) -> list[_Call]:
    """Follow the tensor from call to call; open sequential containers."""
    found: list[_Call] = []
    now = start
    for call in calls:
        if call.given is not now or not isinstance(call.result, Tensor) or isinstance(call.module, _TO_FIXED_SIZE):
            break
        opened = _chain(call.below, now) if isinstance(call.module, nn.Sequential) else []
        found += opened if opened and opened[-1].result is call.result else [call]
        now = call.result
    return found


def _is_map(value: Tensor | None, image: tuple[int, int]) -> bool:
    """Whether a result is a feature map, channels first: both its sides are the image's over one stride."""
    if value is None or value.ndim != 4 or value.shape[2] * value.shape[3] <= 1:
        return False
    # Odd sides round up, so one stride may stand for two slightly different quotients.
    return abs(math.log2(image[0] / value.shape[2]) - math.log2(image[1] / value.shape[3])) < 0.4


def _check(net: nn.Module, links: list[Link]) -> None:
    inside = {id(m) for link in links for m in link.module.modules()}
    own = [m for m in net.modules() if m._parameters and any(p is not None for p in m._parameters.values())]
    held = sum(id(m) in inside for m in own)
    if not links or 2 * held < len(own):
        raise ModelError(
            f"{type(net).__name__} gives no chain of feature maps (only {held} of {len(own)} layers run one after "
            "another on channels-first maps); its library's own feature extractor may do"
        )


def _verified(net: nn.Module, links: list[Link], image: Tensor, expected: list[Tensor]) -> int:
    """Return how many links, run on their own, give what they gave inside the network.

    An operation in place between two modules changes a tensor that stays the same object; only values show it.
    """
    with training_flags(net), torch.no_grad():
        net.eval()
        now = image
        for i, (link, value) in enumerate(zip(links, expected, strict=True)):
            now = link.module(now)
            if not torch.equal(now, value):
                return i
    return len(links)
