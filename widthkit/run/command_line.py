"""Write the command line that gives a command the options of a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from widthkit.run.config import RunConfig, run_options


def command_line(command: str, config: RunConfig, first: Iterable[str] = (), last: Iterable[str] = ()) -> str:
    """Return the command line that gives a command the options of a configuration; defaults are left out.

    Args:
        command: Its name.
        config: The options.
        first: Words that follow the command's name.
        last: Words that end the line.

    >>> command_line("train", RunConfig(model="timm/resnet10t", data="digits", k=4), last=["--out", "out/a"])
    'widthkit train timm/resnet10t --data digits --k 4 --out out/a'
    """
    words = ["widthkit", command, *first]
    for name, value in config.of(command).items():
        declared = run_options()[name]
        if declared.required or value != declared.default:
            words += declared.write(value)
    return shlex.join([*words, *last])
