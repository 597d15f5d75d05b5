"""Give commands the options of a run, and name them in errors as people write them on the command line."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from typing import Annotated, Any

import typer

from widthkit.errors import Option, PluginError
from widthkit.run.config import run_options
from widthkit.run.option import RunOption

FOLDER_GROUP = "Folder"
"""The heading of the options that say where a run lives."""
_FOLDER_FLAGS = {"out": "--out", "resume": "--resume"}


def with_run_options(command: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a function all options of a run that belong to a command.

    Args:
        command: The command's name.

    Returns:
        A decorator. The function gets the options that were given, by name, as its first argument ``given``; its other
        parameters stay as they are.
    """
    options = {name: option for name, option in run_options().items() if command in option.commands}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            texts = {name: values.pop(name) for name in options}
            function({name: options[name].read(text) for name, text in texts.items() if text is not None}, **values)

        generated = [_parameter(option) for option in options.values()]
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        # Arguments stand in the order of the signature; options have no order.
        parameters = [*generated, *(p.replace(kind=p.KEYWORD_ONLY) for p in own)]
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def as_flag(option: Option) -> str:
    """Write an option that an error names as the command line has it; options of plug-ins keep their names.

    >>> as_flag(Option("mixed_precision", "fp16")), as_flag(Option("min_width"))
    ('--precision fp16', '--min-width')
    >>> as_flag(Option("fixed", {"conv1": 8})), as_flag(Option("image_size", None)), as_flag(Option("risk", 2))
    ('--fix conv1=8', 'no --image-size', 'risk=2')
    """
    if option.name in _FOLDER_FLAGS:
        return _FOLDER_FLAGS[option.name]  # the message names the folder itself
    found = _declared(option.name)
    if found is None:
        return str(option)
    if option.value is ...:
        return found.flag
    return shlex.join(found.write(option.value)) or f"no {found.flag}"


def _declared(name: str) -> RunOption | None:
    return next((o for o in run_options().values() if name == o.name or name in o.aliases), None)


def _parameter(option: RunOption) -> inspect.Parameter:
    """Return the parameter from which Typer makes an argument or option."""
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if option.required else None,
        annotation=Annotated[option.text_kind if option.required else option.text_kind | None, _info(option)],
    )


def _default(option: RunOption) -> str:
    """Write an option's default for the help, as markup of rich; Typer gets none and passes on what a user gives."""
    try:
        value = option.default
    except PluginError:
        return ""  # a broken installation must not take the help away; building the configuration says what is wrong
    return "" if value is None or value is False or value in ({}, []) else rf" \[default: {value}]"


def _info(option: RunOption) -> Any:
    if option.is_argument:
        return typer.Argument(help=option.help, metavar=option.flag)
    flags = [f"{option.flag}/{option.off_flag}"] if option.kind is bool else [option.flag]
    return typer.Option(
        *flags,
        help=f"{option.help}{_default(option)}",
        metavar=option.metavar,
        rich_help_panel=option.group,
    )
