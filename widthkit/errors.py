"""The exception tree: every refusal widthkit makes is one of these, with one clear line of text.

A message says what is wrong, where, and the way out. The command line prints it after ``error:`` and exits with
code 2; nothing has been changed or half-written by then.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """An option that a message names: a keyword in Python, a flag on the command line.

    Args:
        name: The keyword.
        value: What it was set to; left out where the message only names the option.

    >>> str(Option("min_width")), str(Option("k", 0))
    ('min_width', 'k=0')
    """

    name: str
    value: Any = ...

    def __str__(self) -> str:
        return self.name if self.value is ... else f"{self.name}={self.value!r}"


class WidthkitError(Exception):
    """Base class of every error that widthkit raises on purpose.

    Args:
        *parts: The message, in parts: texts, and the options that it names. Texts are shown as they are.

    >>> error = OptionError(Option("k", 0), ": a group needs at least one choice")
    >>> str(error)
    'k=0: a group needs at least one choice'
    >>> error.message(lambda option: f"--{option.name} {option.value}")
    '--k 0: a group needs at least one choice'
    """

    def __init__(self, *parts: str | Option) -> None:
        super().__init__(*parts)

    def __str__(self) -> str:
        return self.message()

    def message(self, show: Callable[[Option], str] = str) -> str:
        """Return the message, with every option as ``show`` writes it; as a Python keyword by default."""
        return "".join(show(part) if isinstance(part, Option) else str(part) for part in self.args)


class OptionError(WidthkitError):
    """An option, or a combination of options, that makes no sense."""


class ModelError(WidthkitError):
    """A model that is not known, cannot be built, or cannot run on its example input."""


class TraceError(WidthkitError):
    """A model whose channel groups cannot be found."""


class WidthsError(WidthkitError):
    """Widths or kept units that do not fit the model's channel groups."""


class BudgetError(WidthkitError):
    """A budget that cannot be read, or that no width vector of the space meets."""


class PluginError(WidthkitError):
    """A strategy, searcher or rule that is unknown, broken, or registered twice."""


class DataError(WidthkitError):
    """A data set that is missing, damaged, or of the wrong form."""


class CheckpointError(WidthkitError):
    """A checkpoint that is missing, damaged, or belongs to another run."""


class SlimFileError(WidthkitError):
    """A saved slim network that is missing, damaged, or of another format version."""


class ExportError(WidthkitError):
    """A format that cannot hold a network, or a file that computes something else than the network it came from."""


def one_line(error: BaseException, most: int = 160) -> str:
    r"""Return an error's text on one line, cut after ``most`` characters; without a text, the name of its class.

    >>> one_line(ValueError("a\n  b")), one_line(KeyError())
    ('a b', 'KeyError')
    """
    return " ".join(str(error).split())[:most] or type(error).__name__


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error's text without its full stop; without a text, the name of its class.

    >>> first_line(ValueError("no such device.\ntraceback")), first_line(KeyError())
    ('no such device', 'KeyError')
    """
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def close_matches(name: str, known: Iterable[str]) -> str:
    """Say which known names resemble ``name``, or list them when none does.

    >>> close_matches("lft", ["left", "right"])
    'did you mean left?'
    >>> close_matches("zzz", ["left", "right"])
    'known: left, right'
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f"did you mean {', '.join(near)}?"
    shown = names if len(names) <= 20 else [*names[:20], f"... ({len(names)} in all)"]
    return f"known: {', '.join(shown)}" if shown else "none is installed"
