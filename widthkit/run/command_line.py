"""Write the command line that gives a command the options of a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from widthkit.run.config import RunConfig, run_options
from widthkit.run.option import NONE
from widthkit.run.recipe import recipe


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
    words, of_recipe = ["widthkit", command, *first], recipe(config.recipe).options
    for name, value in config.of(command).items():
        declared = run_options()[name]
        if name in of_recipe and value is None:
            words += declared.write(NONE)
        elif declared.required or value != declared.default or name in of_recipe or _is_chosen(name, config):
            words += declared.write(value)
    return shlex.join([*words, *last])


def _is_chosen(name: str, config: RunConfig) -> bool:
    """Whether the recipe's name must be written, because another one would be taken without it."""
    return name == "recipe" and (config.weights is not None or config.pretrained)
