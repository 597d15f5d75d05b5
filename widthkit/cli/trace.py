"""``widthkit trace`` and ``widthkit plugins``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from widthkit.cli.app import app
from widthkit.cli.generate import with_run_options
from widthkit.cli.options import InputShape, shape_of
from widthkit.modules.models import create_model
from widthkit.report.text import graph_json, graph_text, plugins_text
from widthkit.run.option import TRACE
from widthkit.trace import trace


@app.command(TRACE)
@with_run_options(TRACE)
def trace_command(
    given: dict[str, Any],
    input_shape: InputShape = None,
    free_outputs: Annotated[bool, typer.Option(help="Let the model's outputs vary in width")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="List every tied tensor and every frozen dim")] = False,
) -> None:
    """Show which channels of a model belong together, and what is frozen and why."""
    shape = shape_of(input_shape)
    model = create_model(given["model"], **given.get("model_options", {}))
    graph = trace(model, shape, freeze=given.get("freeze", []), free_outputs=free_outputs)
    if as_json:
        typer.echo(json.dumps(graph_json(graph), indent=1))
    else:
        graph_text(graph, given["model"], verbose=verbose)


@app.command("plugins")
def plugins_command() -> None:
    """List strategies, searchers, score models and rules, with one line each."""
    plugins_text()
