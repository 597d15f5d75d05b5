"""``widthkit recipes``: how networks can be trained."""

from __future__ import annotations

from typing import Annotated

import typer

from widthkit.cli.app import app
from widthkit.run.recipe import recipe, recipes


@app.command("recipes")
def recipes_command(
    name: Annotated[str | None, typer.Argument(metavar="NAME|FILE.yaml", help="Print every value of this one")] = None,
) -> None:
    """List the recipes that come with widthkit, or print one of them as YAML."""
    if name is not None:
        typer.echo(recipe(name).to_yaml(), nl=False)
        return
    width = max(map(len, recipes()))
    for shipped in recipes():
        typer.echo(f"{shipped:{width}}  {recipe(shipped).about}")
