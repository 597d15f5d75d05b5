"""The recipe that a run keeps in its folder, so that it goes on as it began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from widthkit.errors import CheckpointError, Option, OptionError
from widthkit.files import atomic_write
from widthkit.run.config import RunConfig
from widthkit.run.recipe import Recipe, is_file, recipe

_NAME = "recipe.yaml"


def kept_recipe(folder: Path, config: RunConfig) -> Recipe:
    """Return the recipe that a run began with; what options say takes part, so a later step may have its own values.

    Args:
        folder: The run's folder; one without a recipe takes the options'.
        config: The options.

    Raises:
        OptionError: If an option makes no sense.
        CheckpointError: If the recipe is damaged.
    """
    stored = _read(folder)
    return config.resolved() if stored is None else stored.changed(config.recipe_changes())


def kept_options(folder: Path) -> dict[str, Any]:
    """Return the options of a run that go with its recipe.

    Raises:
        CheckpointError: If the recipe is damaged.
    """
    stored = _read(folder)
    return {} if stored is None else dict(stored.options)


def keep_recipe(folder: Path, kept: Recipe) -> None:
    """Write a run's recipe."""
    atomic_write(folder / _NAME, kept.to_yaml().encode())


def check_not_edited(folder: Path, config: RunConfig) -> None:
    """Refuse a file of the user's that was edited after the run began; shipped recipes may change.

    Raises:
        OptionError: With the first value that differs.
    """
    if not is_file(config.recipe):
        return
    difference = next(kept_recipe(folder, config).differences(config.resolved()), None)
    if difference is not None:
        name, before, now = difference
        raise OptionError(
            f"{folder} holds a run with {name}={before}, {config.recipe} now says {name}={now}; put the old value back "
            "or choose another ",
            Option("out"),
        )


def _read(folder: Path) -> Recipe | None:
    file = folder / _NAME
    try:
        return recipe(file) if file.exists() else None
    except OptionError as error:
        raise CheckpointError(f"{error}; the run is damaged, start another one") from error
