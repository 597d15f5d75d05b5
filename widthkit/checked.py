"""Settings that are checked when they are made: one line says which is wrong and why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from widthkit.errors import Option, OptionError, close_matches


def _whole(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("a whole number")
    return value


def _number(value: Any) -> Any:
    # YAML reads 1e-4 as text, because it has no dot.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("a number")
    try:
        number = float(value)
    except ValueError:
        raise ValueError("a number") from None
    if not math.isfinite(number):
        raise ValueError("a finite number")
    return number


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number)]
Share = Annotated[Number, Field(ge=0, lt=1)]


def refusal(text: str) -> PydanticCustomError:
    """Make the error that a validator raises, whose text :func:`checked` shows as it is."""
    return PydanticCustomError("refusal", "{text}", {"text": text})


class CheckedSettings(BaseModel):
    """Base of settings with bounds; make them from a user's values with :func:`checked`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


Kind = TypeVar("Kind", bound=CheckedSettings)


def checked(kind: type[Kind], values: Mapping[str, Any]) -> Kind:
    """Make settings from a user's values.

    Args:
        kind: Which settings.
        values: By name; nested settings are mappings.

    Raises:
        OptionError: With the first value that is wrong, and the closest names for one that is not known.

    >>> class Size(CheckedSettings):
    ...     height: Whole = Field(1, ge=1)
    >>> checked(Size, {"heigth": 3})
    Traceback (most recent call last):
    widthkit.errors.OptionError: unknown setting 'heigth': did you mean height?
    >>> checked(Size, {"height": 0})
    Traceback (most recent call last):
    widthkit.errors.OptionError: height must be at least 1, not 0.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise _refusal(error, kind) from None


def _refusal(error: ValidationError, kind: type[CheckedSettings]) -> OptionError:
    first = error.errors()[0]
    path = [part for part in first["loc"] if isinstance(part, str)]
    option = Option(".".join(path))
    if first["type"] == "refusal":
        # The last part is a setting, unless settings that are wrong together are refused as a whole.
        owners = path[:-1] if _inside(kind, path) is None else path
        prefix = "".join(f"{part}: " for part in owners)
        return OptionError(prefix + first["ctx"]["text"])
    if first["type"] == "missing":
        return OptionError(option, " is missing.")
    if first["type"] == "extra_forbidden":
        prefix, known = "".join(f"{part}." for part in path[:-1]), _names(kind, path[:-1])
        return OptionError(f"unknown setting '{prefix}{path[-1]}': {close_matches(path[-1], known)}")
    if first["type"] == "literal_error":
        known = _literals(kind, path)
        return OptionError("unknown ", option, f" '{first['input']}': {close_matches(str(first['input']), known)}")
    return OptionError(option, f" must be {_wanted(first)}, not {first['input']!r}.")


def _wanted(first: Any) -> str:
    context = first.get("ctx", {})
    words = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
    for name, said in words.items():
        if name in context:
            return f"{said} {context[name]:g}"
    text = str(context.get("error") or first["msg"]).removeprefix("Input should be ")
    return text[:1].lower() + text[1:]


def _inside(kind: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    """Return the settings that a path leads to; ``None`` where it leads to a single value."""
    for part in path:
        found = [t for t in _types(kind.model_fields[part].annotation) if issubclass(t, BaseModel)]
        if not found:
            return None
        kind = found[0]
    return kind


def _names(kind: type[BaseModel], path: list[str]) -> list[str]:
    found = _inside(kind, path)
    assert found is not None
    return list(found.model_fields)


def _literals(kind: type[BaseModel], path: list[str]) -> list[str]:
    found = _inside(kind, path[:-1])
    assert found is not None
    return [value for value in _values(found.model_fields[path[-1]].annotation) if isinstance(value, str)]


def _types(annotation: Any) -> list[type]:
    parts = getattr(annotation, "__args__", ())
    return [annotation] if isinstance(annotation, type) else [t for part in parts for t in _types(part)]


def _values(annotation: Any) -> list[Any]:
    parts = getattr(annotation, "__args__", ())
    return [value for part in parts for value in (_values(part) if hasattr(part, "__args__") else [part])]
