"""Coupling rules: one function per operator family, found by operator name.

Built-in rules live in the modules of this package. Other packages register theirs through the entry-point group
``widthkit.rules`` or the decorator ``widthkit.trace.rules.RULES.register("my_operator")``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from widthkit.registry import Registry
from widthkit.trace.context import OpContext

Rule = Callable[[OpContext], None]
RULES: Registry[Rule] = Registry("rule", "widthkit.rules", None)
_BUILTIN: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a built-in rule for several operator names."""

    def add(function: Rule) -> Rule:
        for name in names:
            assert name not in _BUILTIN, name
            _BUILTIN[name] = function
        return function

    return add


def find(func: torch._ops.OpOverload) -> Rule | None:
    """Return the rule for an operator, ``None`` without one.

    Registered rules come first, then built-in ones, then the element-wise rule for operators that ATen tags so.
    """
    name = func.overloadpacket.__name__
    if name in RULES.names():
        return RULES.get(name)
    if name in _BUILTIN:
        return _BUILTIN[name]
    bare = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    if bare in _BUILTIN:
        return _BUILTIN[bare]
    if torch.Tag.pointwise in func.tags:
        return _BUILTIN["pointwise"]
    return None


def _load_builtin() -> None:
    """Import the modules that hold the built-in rules."""
    from widthkit.trace.rules import (  # noqa: F401
        contract,
        convolve,
        indexing,
        joining,
        normalize,
        pointwise,
        reduce,
        resize,
        views,
    )


_load_builtin()
