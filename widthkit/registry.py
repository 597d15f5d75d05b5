"""One strict registry for every kind of plug-in.

Plug-ins come in through entry points or a decorator; the core knows none of them by name. Duplicates raise,
unknown names list what exists, and a plug-in that cannot be imported is kept as a named failure: it raises when
somebody asks for it and does not take the others down.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from widthkit.errors import PluginError, close_matches

T = TypeVar("T")
P = TypeVar("P")


@dataclass(frozen=True)
class PluginInfo:
    """What ``widthkit plugins`` shows of one plug-in."""

    kind: str
    name: str
    summary: str
    distribution: str
    error: str | None = None


class Registry(Generic[T]):
    """Named plug-ins of one kind.

    Args:
        kind: The word used in messages, such as ``"strategy"``.
        group: The entry-point group, such as ``"widthkit.strategies"``.
        base: The class that every plug-in must subclass, or ``None`` for plain callables.

    >>> rules = Registry("rule", "widthkit.example_rules", None)
    >>> @rules.register("twice")
    ... def twice(x):
    ...     "Double a number."
    ...     return 2 * x
    >>> rules.get("twice")(4), rules.names()
    (8, ['twice'])
    """

    def __init__(self, kind: str, group: str, base: type | None) -> None:
        self.kind = kind
        self.group = group
        self.base = base
        self._items: dict[str, T] = {}
        self._owner: dict[str, str] = {}
        self._failed: dict[tuple[str, str], str] = {}
        self._scanned = False

    def register(self, name: str) -> Callable[[P], P]:
        """Return a decorator that registers a plug-in under ``name``.

        Raises:
            PluginError: If the name is taken or the object is not of the registry's kind.
        """

        def add(item: P) -> P:
            self._scan()
            self._add(name, item, getattr(item, "__module__", "?"))
            return item

        return add

    def get(self, name: str) -> T:
        """Return the plug-in called ``name``.

        Raises:
            PluginError: If there is none (with the close matches), or if it could not be imported.
        """
        self._scan()
        if name in self._items:
            return self._items[name]
        broken = [error for (failed, _), error in sorted(self._failed.items()) if failed == name]
        raise PluginError("; ".join(broken) or f"unknown {self.kind} '{name}': {close_matches(name, self._items)}")

    def names(self) -> list[str]:
        """List the usable names in alphabetical order."""
        self._scan()
        return sorted(self._items)

    def infos(self) -> Iterator[PluginInfo]:
        """Describe every plug-in, broken ones included."""
        self._scan()
        for name in self.names():
            # A class's own docstring: the base's would describe every plug-in alike.
            doc = inspect.cleandoc(getattr(self._items[name], "__doc__", None) or "").splitlines()
            yield PluginInfo(self.kind, name, doc[0] if doc else "(no description)", self._owner[name])
        for (name, owner), error in sorted(self._failed.items()):
            yield PluginInfo(self.kind, name, "", owner, error)

    def _add(self, name: str, item: object, owner: str) -> None:
        why = self._refusal(name, item)
        if why:
            raise PluginError(f"{self.kind} '{name}' of {owner} cannot be used: {why}")
        self._items[name] = item  # type: ignore[assignment]
        self._owner.setdefault(name, owner)

    def _refusal(self, name: str, item: object) -> str:
        if name in self._items and self._items[name] is not item:
            return f"that name is already taken by {self._owner[name]}; rename one of them"
        if self.base is not None and not (inspect.isclass(item) and issubclass(item, self.base)):
            return f"it must be a subclass of {self.base.__name__}"
        if inspect.isclass(item) and inspect.isabstract(item):
            return f"it leaves {', '.join(sorted(getattr(item, '__abstractmethods__', ())))} undefined"
        if self.base is None:
            return "" if callable(item) else f"it is of type {type(item).__name__}, not a function"
        return _misfit(item, self.base)  # type: ignore[arg-type]

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        for point in sorted(entry_points(group=self.group), key=lambda p: (p.name, _distribution(p))):
            self._load(point)

    def _load(self, point: EntryPoint) -> None:
        owner = _distribution(point)
        try:
            self._add(point.name, point.load(), owner)
        except PluginError as error:
            self._failed[point.name, owner] = str(error)
        # A module may also call sys.exit() while it is imported.
        except (Exception, SystemExit) as error:
            self._failed[point.name, owner] = f"{self.kind} '{point.name}' of {owner} cannot be used: {_why(error)}"


def _why(error: BaseException) -> str:
    line = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{line}; install {error.name.partition('.')[0]}, or uninstall the plug-in"
    return line


def _misfit(item: type, base: type) -> str:
    """Say which method cannot be called as the base's is; nothing if all can."""
    names = ["__init__"] if "__init__" in vars(base) else []
    for name in [*names, *sorted(n for n, value in vars(base).items() if n[0] != "_" and inspect.isfunction(value))]:
        wanted, found = getattr(base, name), getattr(item, name)
        if not callable(found):
            return f"its {name} is of type {type(found).__name__}, not a method"
        call, signature = _arguments(wanted), _signature(found)
        try:
            if signature is not None:
                signature.bind(*call)
        except TypeError as error:
            return f"{name}{signature} cannot be called with ({', '.join(call[1:])}): {error}"
    return ""


def _arguments(function: Callable[..., object]) -> list[str]:
    return [name for name, p in inspect.signature(function).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]


def _signature(function: Callable[..., object]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # some built-in callables have none
        return None


def _distribution(point: EntryPoint) -> str:
    # A damaged installation may have no name.
    return (point.dist.name if point.dist is not None else None) or "?"
