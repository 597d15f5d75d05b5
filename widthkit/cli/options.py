"""Options of commands that are no options of a run, and how files and texts are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from widthkit.cli.generate import FOLDER_GROUP
from widthkit.errors import ModelError, OptionError
from widthkit.run.config import run_options

Folder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results", rich_help_panel=FOLDER_GROUP)]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run", rich_help_panel=FOLDER_GROUP)]
InputShape = Annotated[str | None, typer.Option("--input", help="Shape of the example input: 1,3,224,224")]
JsonFile = Annotated[Path | None, typer.Option("--out", help="Also write the result to this JSON file")]
DataDir = Annotated[str | None, typer.Option(help=run_options()["data_dir"].help)]
BudgetText = Annotated[str, typer.Option("--budget", help=run_options()["budget"].help)]


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """Read an input shape such as 1,3,224,224.

    Raises:
        ModelError: If the text is none.
    """
    if text is None:
        return None
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ModelError(f"--input '{text}' is not a shape; write it like 1,3,224,224")
    return shape


def read_widths(path: Path) -> dict[str, int]:
    """Read a JSON file of widths: group name -> width, alone or under ``widths``.

    Raises:
        OptionError: If the file holds none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(
            f"{path} cannot be read as widths ({error}); write a JSON object of group names and widths"
        ) from error
    widths = data.get("widths", data) if isinstance(data, dict) else None
    if not isinstance(widths, dict) or not all(isinstance(v, int) for v in widths.values()):
        raise OptionError(f"{path} holds no widths; write a JSON object of group names and whole numbers")
    return widths
