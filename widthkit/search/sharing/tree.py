"""Nested lists, tuples and dicts of arguments: list their leaves, or rebuild them with other leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_ATOMS = (int, float, bool, str, type(None))


def replace(tree: Any, kind: type | tuple[type, ...], new: Callable[[Any], Any]) -> Any:
    """Rebuild nested lists, tuples and dicts with every leaf of a kind replaced, in order."""
    if type(tree) in _ATOMS:
        return tree
    if isinstance(tree, kind):
        return new(tree)
    if isinstance(tree, list):
        return [replace(item, kind, new) for item in tree]
    if isinstance(tree, tuple):
        items = [replace(item, kind, new) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, dict):
        return {name: replace(item, kind, new) for name, item in tree.items()}
    return tree


def leaves(tree: Any, kind: type) -> list[Any]:
    """List the leaves of a kind in nested lists, tuples and dicts, in order."""
    found: list[Any] = []
    replace(tree, kind, found.append)
    return found
