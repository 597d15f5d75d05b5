"""What a model is made of: channel groups, and the plug-ins at hand."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from widthkit.cli.app import app
from widthkit.cli.options import Freeze, Model, ModelOption, pairs, shape_of


@app.command("trace")
def trace_command(
    model: Model,
    input_shape: Annotated[str | None, typer.Option("--input", help="Shape of the example input: 1,3,224,224")] = None,
    freeze: Freeze = None,
    free_outputs: Annotated[bool, typer.Option(help="Let the model's outputs vary in width")] = False,
    model_option: ModelOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="List every tied tensor and every frozen dim")] = False,
) -> None:
    """Show which channels of a model belong together, and what is frozen and why."""
    from widthkit.modules.models import create_model
    from widthkit.report.text import graph_json, graph_text
    from widthkit.trace import trace

    shape = shape_of(input_shape)
    graph = trace(create_model(model, **pairs(model_option)), shape, freeze=freeze or [], free_outputs=free_outputs)
    if as_json:
        typer.echo(json.dumps(graph_json(graph), indent=1))
    else:
        graph_text(graph, model, verbose=verbose)


@app.command("plugins")
def plugins_command() -> None:
    """List strategies, searchers and rules, with one line each."""
    from widthkit.report.text import plugins_text

    plugins_text()
