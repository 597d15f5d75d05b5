"""Pictures that explain how widthkit works."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from widthkit.cli.app import app

plot = typer.Typer(help="Draw how strategies share weights.", no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(plot, name="plot")


# One command would take the place of its group.
@plot.callback()
def plot_group() -> None:
    """Draw how strategies share weights."""


@plot.command("cardinality")
def plot_cardinality(
    strategies: Annotated[
        list[str] | None,
        typer.Option("--strategy", help="NAME or NAME:OPTION=VALUE,...; every registered one by default"),
    ] = None,
    width: Annotated[int, typer.Option(min=2, max=64, help="Channels of the layer")] = 12,
    base: Annotated[str, typer.Option(help="Narrowest width in the lower half of the picture")] = "0.25x",
    out: Annotated[Path, typer.Option("--out", help="The PNG file")] = Path("cardinality.png"),
) -> None:
    """Draw how often each channel is judged and trained, counted from gradients on a small layer."""
    from widthkit.registry import PluginChoice
    from widthkit.report.cardinality import draw_cardinality
    from widthkit.supernet.strategy import STRATEGIES, make_strategy

    choices = [PluginChoice.read(text) for text in strategies or STRATEGIES.names()]
    draw_cardinality({c.label: make_strategy(c.name, c.options) for c in choices}, out, width=width, base=base)
    typer.echo(out)
