"""What there is to search: choices, bins and the size of the space."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from widthkit.cli.app import app
from widthkit.cli.options import (
    Bins,
    Choices,
    Divisor,
    Fix,
    Freeze,
    MaxWidth,
    MinWidth,
    Model,
    ModelOption,
    fixed_widths,
    pairs,
    shape_of,
)


@app.command("space")
def space_command(
    model: Model,
    input_shape: Annotated[str | None, typer.Option("--input", help="Shape of the example input: 1,3,224,224")] = None,
    k: Choices = 10,
    bins: Bins = None,
    min_width: MinWidth = "0.1x",
    max_width: MaxWidth = "1x",
    divisor: Divisor = 1,
    fix: Fix = None,
    freeze: Freeze = None,
    model_option: ModelOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Draw the bins of every group into this PNG file")] = None,
) -> None:
    """Show the search space of a model: choices, bins, MACs per channel of every group, and how large it is."""
    from widthkit.errors import OptionError
    from widthkit.files import atomic_write
    from widthkit.graph.space import make_space
    from widthkit.modules.models import create_model
    from widthkit.report.space import draw_space, space_json, space_text
    from widthkit.trace import trace

    if out is not None and out.suffix.lower() != ".png":
        raise OptionError(f"--out {out}: the picture is a PNG file; name it like bins.png")
    shape, fixed = shape_of(input_shape), fixed_widths(fix)
    graph = trace(create_model(model, **pairs(model_option)), shape, freeze=freeze or [])
    space = make_space(graph, k=k, bins=bins, min_width=min_width, max_width=max_width, divisor=divisor, fixed=fixed)
    if as_json:
        typer.echo(json.dumps(space_json(space), indent=1))
    else:
        space_text(space, model)
    if out is not None:
        atomic_write(out, draw_space(space, model))
        typer.echo(f"picture in {out}", err=True)
