"""The Typer applications that commands register with."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="Make any torchvision or timm model slimmer: trace its channel groups, train a weight-sharing supernet, "
    "search widths under a budget, export a dense network.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
bench = typer.Typer(
    help="Measure models on your own devices; results are JSON with versions and device.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")
