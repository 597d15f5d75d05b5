"""The options of a new run: those that a user gives, and those of the recipe."""

from __future__ import annotations

from typing import Any

from widthkit.errors import OptionError
from widthkit.run.config import EPOCHS, FOR_FRESH, FOR_TRAINED, IN_ALL_TRAININGS, RunConfig
from widthkit.run.option import NONE
from widthkit.run.recipe import recipe


def new_config(**values: Any) -> RunConfig:
    """Make the options of a new run from those that a user gives; the recipe's options fill in the others.

    Without a recipe's name, a run that starts from trained weights takes the one for these. ``"none"`` as the
    ranking turns off the recipe's. Where another strategy or searcher is named than the recipe's, the options of the
    recipe's do not count.

    Raises:
        OptionError: As :class:`RunConfig`, and if there is no such recipe.

    >>> new_config(model="timm/resnet10t", data="digits", pretrained=True).recipe
    'finetune'
    """
    trained = values.get("weights") is not None or bool(values.get("pretrained"))
    values = {"recipe": FOR_TRAINED if trained else FOR_FRESH, **values}
    options = dict(recipe(values["recipe"]).options)
    for name in set(options) & (set(IN_ALL_TRAININGS) | set(EPOCHS) | {"set", "recipe", "model", "data"}):
        raise OptionError(f"{values['recipe']}: '{name}' is no option that a recipe may hold; write it as a setting")
    for name in ("strategy", "searcher"):
        if values.get(name, options.get(name)) != options.get(name):
            options.pop(f"{name}_options", None)
    values = {**options, **values}
    return RunConfig(**{**values, "rank": None if values.get("rank") == NONE else values.get("rank")})
