"""What there is to search: choices, bins and the size of the space."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from widthkit.cli.app import app
from widthkit.cli.generate import with_run_options
from widthkit.cli.options import InputShape, shape_of
from widthkit.errors import OptionError
from widthkit.files import atomic_write
from widthkit.graph.space import make_space
from widthkit.modules.models import create_model
from widthkit.report.space import draw_space, space_json, space_text
from widthkit.run.option import SPACE
from widthkit.supernet.strategy import make_strategy
from widthkit.trace import trace


@app.command(SPACE)
@with_run_options(SPACE)
def space_command(
    given: dict[str, Any],
    input_shape: InputShape = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Draw the bins of every group into this PNG file")] = None,
) -> None:
    """Show the search space of a model: choices, bins, MACs per channel of every group, and how large it is."""
    if out is not None and out.suffix.lower() != ".png":
        raise OptionError(f"--out {out}: the picture is a PNG file; name it like bins.png")
    shape = shape_of(input_shape)
    name, options, freeze = given.pop("model"), given.pop("model_options", {}), given.pop("freeze", [])
    graph = trace(create_model(name, **options), shape, freeze=freeze)
    strategy = make_strategy(given.pop("strategy", None), given.pop("strategy_options", {}))
    space = make_space(graph, **given)
    if as_json:
        typer.echo(json.dumps(space_json(space, strategy), indent=1))
    else:
        space_text(space, name, strategy)
    if out is not None:
        atomic_write(out, draw_space(space, name))
        typer.echo(f"picture in {out}", err=True)
