"""The table of all options, ``docs/options.md``: ``python -m widthkit.run.options_table > docs/options.md``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from widthkit.run.config import run_options
from widthkit.run.option import RunOption

_HEAD = """# Options of a run

Every option is declared in `widthkit/run/config.py`. The commands, their `--help`, the flags that errors name and this
page are made from it:

```sh
python -m widthkit.run.options_table > docs/options.md
```

In Python the options are fields of `widthkit.run.config.RunConfig`. `widthkit.make_supernet`, `widthkit.train`,
`widthkit.search` and `widthkit.load_data` take those that concern them under the same names, with the same defaults.
How networks are trained is said by a recipe ([recipes.md](recipes.md)); options that replace its values have none.
Options that take `NAME=VALUE` or `GROUP=WIDTH`, and `--freeze`, may be given several times; `none` turns an option off.
"""


def options_table() -> str:
    """Return the page: one table per group of options."""
    parts = [_HEAD]
    for group, options in groupby(run_options().values(), key=lambda option: option.group):
        parts.append(f"\n## {group}\n\n| option | field | default | commands | meaning |\n|---|---|---|---|---|\n")
        parts += [f"| {' | '.join(_cells(option))} |\n" for option in options]
    return "".join(parts)


def _cells(option: RunOption) -> Iterator[str]:
    value = f" {option.metavar}" if option.metavar else ""
    yield f"`{option.flag}{value}`".replace("|", "\\|")
    yield f"`{option.name}`"
    yield "required" if option.required else _default(option.default)
    yield ", ".join(option.commands)
    yield f"*{option.title}.* {option.help}"


def _default(value: Any) -> str:
    if value in ({}, []) or value is None:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    print(options_table(), end="")
