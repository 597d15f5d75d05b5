"""One strict registry for every kind of plug-in.

Plug-ins come in through entry points or a decorator; the core knows none of them by name. Duplicates raise,
unknown names list what exists, and a plug-in that cannot be imported is kept as a named failure: it raises when
somebody asks for it and does not take the others down.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, get_type_hints

from widthkit.errors import OptionError, PluginError, close_matches

T = TypeVar("T")
P = TypeVar("P")

DEFAULTS = "widthkit.defaults"
"""The entry-point group in which a package says which of its plug-ins is taken where the caller names none."""


@dataclass(frozen=True)
class PluginChoice:
    """A plug-in with options, as people write it on a command line.

    Args:
        label: The text itself: ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE``.
        name: The registered name.
        options: Its options.
    """

    label: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, text: str) -> PluginChoice:
        """Read the text; a value that is not JSON is text.

        >>> PluginChoice.read("mine:layout=wide,iterative=false").options
        {'layout': 'wide', 'iterative': False}

        Raises:
            OptionError: If it is not of that form.
        """
        name, _, rest = text.partition(":")
        options: dict[str, Any] = {}
        for item in filter(None, rest.split(",")):
            option, equals, value = item.partition("=")
            if not equals:
                raise OptionError(f"'{text}' is not of the form NAME:OPTION=VALUE,OPTION=VALUE")
            try:
                options[option] = json.loads(value)
            except ValueError:
                options[option] = value
        return cls(text, name, options)


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

    @property
    def default(self) -> str:
        """The name that is taken where the caller gives none, as marked in the entry-point group ``widthkit.defaults``.

        Raises:
            PluginError: If no installed package marks one, or several do.
        """
        kind = self.kind.replace(" ", "_")
        points = [p for p in entry_points(group=DEFAULTS) if p.name == kind]
        if len(points) != 1:
            owners = ", ".join(sorted(map(_distribution, points)))
            why = f"{owners} each mark a default {self.kind}" if points else f"no default {self.kind} is installed"
            raise PluginError(f"{why}; name one of: {', '.join(self.names())}")
        item = points[0].load()
        named = [name for name in self.names() if self._items[name] is item]
        if not named:
            raise PluginError(f"the default {self.kind} of {_distribution(points[0])} is not registered under a name")
        return named[0]

    def build(
        self, plugin: Any, options: Mapping[str, Any], *given: Any, offered: Mapping[str, Any] | None = None
    ) -> Any:
        """Make a plug-in from its name and options; an instance passes as it is.

        Args:
            plugin: A registered name, or an instance.
            options: What the user set, by parameter name.
            *given: What every plug-in of this kind gets first.
            offered: Passed to those whose constructor has a parameter of that name, unless the user set it.

        Raises:
            PluginError: If no plug-in has that name.
            OptionError: If it does not take one of the options, or not with that value.
        """
        if not isinstance(plugin, str):
            return self._instance(plugin, options)
        cls: Any = self.get(plugin)
        parameters = inspect.signature(cls).parameters
        known = [name for name, p in list(parameters.items())[len(given) :] if p.kind is not p.VAR_KEYWORD]
        unknown = sorted(set(options) - set(known))
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            hint = f"its options are: {', '.join(known)}" if known else "it has none"
            raise OptionError(f"{self.kind} '{plugin}' has no option '{unknown[0]}'; {hint}")
        self._check_types(plugin, cls, options)
        more = {name: value for name, value in (offered or {}).items() if name in parameters and name not in options}
        try:
            return cls(*given, **options, **more)
        except (TypeError, ValueError) as error:
            raise OptionError(f"{self.kind} '{plugin}': {' '.join(str(error).split())}") from error

    def _instance(self, plugin: Any, options: Mapping[str, Any]) -> Any:
        if options:
            raise OptionError(f"options {sorted(options)} go with a {self.kind} name, not with an instance")
        if self.base is not None and not isinstance(plugin, self.base):
            made = f"; write {plugin.__name__}(...)" if isinstance(plugin, type) else ""
            raise OptionError(f"a {self.kind} is a registered name or an instance, not {plugin!r}{made}")
        return plugin

    def _check_types(self, plugin: str, cls: Any, options: Mapping[str, Any]) -> None:
        hints = get_type_hints(cls.__init__) if options else {}
        for name, value in options.items():
            wanted = hints.get(name)
            if wanted in _SIMPLE and (
                not isinstance(value, _SIMPLE[wanted]) or isinstance(value, bool) != (wanted is bool)
            ):
                raise OptionError(f"{self.kind} '{plugin}': {name} must be {_NAMES[wanted]}, not {value!r}")

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


_SIMPLE: dict[Any, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
_NAMES: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


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
