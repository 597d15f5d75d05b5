"""How an option of a run is declared, and how its value is written as text on the command line."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from widthkit.errors import Option, OptionError

TRACE, SPACE, TRAIN, SEARCH, SLIM = "trace", "space", "train", "search", "slim"
"""The commands that take options of a run."""
NONE = "none"
"""The value that turns off a setting."""


def option(
    default: Any = ...,
    title: str = "",
    help: str = "",
    *,
    group: str,
    commands: Sequence[str],
    flag: str | None = None,
    aliases: Sequence[str] = (),
    **field: Any,
) -> Any:
    """Declare one option of a run.

    Args:
        default: Its value where the user gives none; left out where the user must give one. A function makes the value
            when a configuration is made.
        title: A few words.
        help: What it means.
        group: The heading under which ``--help`` and the table of options show it.
        commands: The commands that take it.
        flag: How it is written on the command line; by default ``--`` and its name. An upper-case word is an argument.
        aliases: Names that library functions give it where they differ; errors may use them.
        **field: Bounds, as in :func:`pydantic.Field`.
    """
    made = {"default_factory": default} if callable(default) else {"default": default}
    declared: dict[str, Any] = {"group": group, "commands": list(commands), "flag": flag, "aliases": list(aliases)}
    return Field(**made, title=title, description=help, json_schema_extra=declared, **field)


@dataclass(frozen=True)
class RunOption:
    """One declared option.

    Args:
        name: The field of the configuration, and the keyword in Python.
        field: Its declaration.
    """

    name: str
    field: FieldInfo

    @property
    def title(self) -> str:
        """A few words."""
        return self.field.title or self.name

    @property
    def help(self) -> str:
        """What it means, with its bounds."""
        bounds = self.bounds
        return f"{self.field.description}{f' ({bounds})' if bounds else ''}"

    @property
    def group(self) -> str:
        """The heading under which it is shown."""
        return str(self._declared["group"])

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands that take it."""
        return tuple(self._declared["commands"])

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other names that library functions give it."""
        return tuple(self._declared["aliases"])

    @property
    def flag(self) -> str:
        """How it is written on the command line."""
        return str(self._declared["flag"] or f"--{self.name.replace('_', '-')}")

    @property
    def is_argument(self) -> bool:
        """Whether it stands on the command line without a flag."""
        return not self.flag.startswith("--")

    @property
    def bounds(self) -> str:
        """The bounds of its value in words; empty where there are none."""
        said = []
        for bound in self.field.metadata:
            if isinstance(bound, annotated_types.Ge):
                said.append(f"at least {bound.ge}")
            if isinstance(bound, annotated_types.Gt):
                said.append(f"above {bound.gt}")
        return " and ".join(said)

    @property
    def required(self) -> bool:
        """Whether the user must give it."""
        return self.field.is_required()

    @property
    def default(self) -> Any:
        """Its value where the user gives none; ``None`` where one must be given."""
        value = self.field.get_default(call_default_factory=True)
        return None if value is PydanticUndefined else value

    @property
    def kind(self) -> Any:
        """The type of its value, apart from ``None``."""
        if get_origin(self.field.annotation) in (Union, types.UnionType):
            return next(kind for kind in get_args(self.field.annotation) if kind is not type(None))
        return self.field.annotation

    @property
    def text_kind(self) -> Any:
        """The type in which the command line gives its value to :meth:`read`."""
        if get_origin(self.kind) in (dict, list):
            return list[str]
        if get_origin(self.kind) is Literal or self._can_be_turned_off:
            return str
        return self.kind

    @property
    def metavar(self) -> str | None:
        """How ``--help`` writes its value, where its type does not say."""
        if get_origin(self.kind) is dict:
            return _pair(self.kind)
        if get_origin(self.kind) is Literal:
            return "|".join(get_args(self.kind))
        return f"NUMBER|{NONE}" if self._can_be_turned_off else None

    def read(self, given: Any) -> Any:
        """Turn what the command line gives into the value.

        Args:
            given: A value of :attr:`text_kind`.

        Raises:
            OptionError: If a text is not of the option's form.
        """
        if get_origin(self.kind) is dict:
            return dict(self._read_pair(item) for item in given)
        if not self._can_be_turned_off:
            return given
        if given == NONE:
            return NONE
        try:
            return self.kind(given)
        except ValueError:
            raise OptionError(Option(self.name, given), f": write a number, or {NONE}") from None

    def write(self, value: Any) -> list[str]:
        """Return the arguments of the command line that give the option this value; none where it is not given."""
        if self.is_argument:
            return [str(value)]
        if isinstance(value, bool):
            return [self.flag if value else self.off_flag]
        if isinstance(value, dict):
            return [word for name, item in value.items() for word in (self.flag, f"{name}={_item_text(item)}")]
        if isinstance(value, list):
            return [word for item in value for word in (self.flag, str(item))]
        if value is None:
            return []
        return [self.flag, str(value)]

    @property
    def off_flag(self) -> str:
        """The flag that turns off an option that is true or false."""
        return self.flag.replace("--", "--no-", 1)

    @property
    def _declared(self) -> dict[str, Any]:
        declared = self.field.json_schema_extra
        assert isinstance(declared, dict)
        return declared

    @property
    def _can_be_turned_off(self) -> bool:
        return any(NONE in get_args(kind) for kind in get_args(self.field.annotation))

    def _read_pair(self, item: str) -> tuple[str, Any]:
        whole = get_args(self.kind)[1] is int
        # Names of groups may hold an equals sign; values of options may.
        name, equals, text = item.rpartition("=") if whole else item.partition("=")
        if not equals or not name or (whole and not text.strip().isdecimal()):
            hint = "; widthkit space lists the groups" if whole else ""
            raise OptionError(Option(self.name), f" '{item}': write it as {_pair(self.kind)}{hint}")
        return name, int(text) if whole else _item_value(text)


def options_of(config: type[BaseModel]) -> dict[str, RunOption]:
    """Return all declared options of a configuration, by name, in the order of their declaration."""
    return {name: RunOption(name, field) for name, field in config.model_fields.items()}


def _pair(kind: Any) -> str:
    return "GROUP=WIDTH" if get_args(kind)[1] is int else "NAME=VALUE"


def _item_value(text: str) -> Any:
    """Read JSON; what is none is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _item_text(value: Any) -> str:
    return value if isinstance(value, str) and _item_value(value) == value else json.dumps(value)


def refusal(error: ValidationError, options: Mapping[str, RunOption]) -> OptionError:
    """Say in one line what pydantic refuses."""
    first = error.errors()[0]
    name = str(first["loc"][0])
    if first["type"] == "missing":
        return OptionError(Option(name), " is missing")
    if first["type"] == "extra_forbidden":
        return OptionError(f"a run has no option '{name}'")
    bounds = options[name].bounds
    why = f"it must be {bounds}" if bounds and "than" in first["type"] else first["msg"]
    return OptionError(Option(name, first["input"]), f": {why}")
