"""Every option of a run, declared once: commands, help, the docs' table and errors are made from this file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from widthkit.run.option import NONE, SEARCH, SLIM, SPACE, TRACE, TRAIN, RunOption, option, options_of, refusal
from widthkit.run.recipe import Recipe, recipe
from widthkit.search import SEARCHERS
from widthkit.supernet.strategy import STRATEGIES

_MODEL: dict[str, Any] = {"group": "Model", "commands": (TRACE, SPACE, TRAIN, SLIM)}
_START: dict[str, Any] = {"group": "Model", "commands": (TRAIN, SLIM)}
_DATA: dict[str, Any] = {"group": "Data", "commands": (TRAIN, SLIM)}
_SPACE: dict[str, Any] = {"group": "Search space", "commands": (SPACE, TRAIN, SLIM)}
_TRAINING: dict[str, Any] = {"group": "Training", "commands": (TRAIN, SLIM)}
_STRATEGY: dict[str, Any] = {"group": "Training", "commands": (SPACE, TRAIN, SLIM)}
_SEARCH: dict[str, Any] = {"group": "Search", "commands": (SEARCH, SLIM)}
_FINAL: dict[str, Any] = {"group": "Final trainings", "commands": (SLIM,)}

IN_ALL_TRAININGS = (
    "batch_size",
    "augment",
    "optimizer",
    "lr",
    "weight_decay",
    "schedule",
    "clip_grad",
    "mixed_precision",
)
FOR_FRESH, FOR_TRAINED = "default", "finetune"
"""Recipes of runs that name none."""
EPOCHS = {"epochs": "supernet.epochs", "stand_alone_epochs": "calibration.epochs", "final_epochs": "final.epochs"}
"""Options that replace values of the recipe: in all its trainings, or in one of them."""


def _override(title: str, help: str, group: dict[str, Any] = _TRAINING, **field: Any) -> Any:
    """Declare an option that replaces a value of the recipe."""
    return option(None, title, f"{help}; by default as the recipe says", **group, **field)


class RunConfig(BaseModel):
    """Everything that a run depends on; two runs with equal settings on one machine give equal results.

    Raises:
        OptionError: If a value has the wrong type or is out of bounds.

    >>> config = RunConfig(model="timm/resnet10t", data="digits", k=4)
    >>> config.k, config.min_width
    (4, '0.1x')
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = option(
        title="Dense model",
        help="torchvision/NAME, timm/NAME, package.module:factory or FILE.py:factory",
        flag="MODEL",
        **_MODEL,
    )
    model_options: dict[str, Any] = option(
        {}, "Model's arguments", "Argument of the model's factory; the value is JSON", flag="--model-option", **_MODEL
    )
    merges: bool = option(
        False, "Blocks that merge", "Train the branches of blocks such as RepVGG's; slim networks are merged", **_START
    )
    freeze: list[str] = option([], "Frozen modules", "Module path or pattern whose output widths stay", **_MODEL)
    pretrained: bool = option(False, "Pretrained weights", "Start from the library's weights", **_START)
    weights: str | None = option(
        None, "Trained weights", "Start from the weights of this file: safetensors or a PyTorch state dict", **_START
    )
    reset_head: bool = option(
        False, "Fresh head", "Allow that the head in the file of weights has another size", **_START
    )
    rank: str | None = option(
        None,
        "Ranking of units",
        "Order units by importance before they are shared, for pretrained models: magnitude, bn-scale, lamp, fpgm, "
        "taylor or hessian",
        **_START,
    )
    rank_images: int = option(
        256, "Images for the ranking", "Training images for the rankings that need gradients", ge=1, **_START
    )

    data: str = option(title="Data set", help="digits, fashion-mnist, cifar10, folder:DIR or npz:FILE", **_DATA)
    data_dir: str | None = option(None, "Data folder", "Where the files of fashion-mnist or cifar10 lie", **_DATA)
    image_size: int | None = option(
        None,
        "Image size",
        "Side length to which images are resized; by default their own, but not below 32",
        ge=1,
        **_DATA,
    )
    mean: str | None = option(
        None,
        "Mean",
        "Means of the normalisation, as shares of 0..1 per channel, such as 0.485,0.456,0.406; by default those of the "
        "trained weights where timm or torchvision state them, else the data's",
        **_DATA,
    )
    std: str | None = option(None, "Deviation", "Deviations of the normalisation, in the same form", **_DATA)
    limit: int | None = option(None, "Most images", "Each part of the data is cut to so many images", ge=1, **_DATA)

    strategy: str = option(
        lambda: STRATEGIES.default,
        "Sharing strategy",
        "How sub-networks share weights; widthkit plugins lists the strategies",
        **_STRATEGY,
    )
    strategy_options: dict[str, Any] = option(
        {}, "Strategy's options", "Option of the strategy; the value is JSON", flag="--strategy-option", **_STRATEGY
    )
    recipe: str = option(
        FOR_FRESH,
        "Recipe",
        "How the networks are trained: FILE.yaml, or one of those that widthkit recipes lists; finetune is the default "
        "where the run starts from trained weights",
        **_TRAINING,
    )
    set: dict[str, Any] = option(
        {},
        "Other values in the recipe",
        "Setting of the recipe, such as final.lr=0.01, or lr=0.01 for all its trainings; the value is JSON",
        **_TRAINING,
    )
    epochs: int | None = _override("Epochs", "Trainings of the supernet see the data so many times", ge=0)
    batch_size: int | None = _override("Batch size", "Images per training step", ge=1)
    augment: bool | None = _override("Augmentation", "Crop and flip training images at random")
    optimizer: str | None = _override("Optimiser", "By timm's name; widthkit takes all of timm's optimisers")
    lr: float | None = _override("Learning rate", "Rate at which trainings start; the schedule lowers it", gt=0)
    weight_decay: float | None = _override("Weight decay", "Pull of the weights towards zero", ge=0)
    schedule: str | None = _override("Schedule", "How the learning rate falls, such as cosine or linear")
    clip_grad: float | Literal["none"] | None = _override("Gradient clipping", "Largest norm of the whole gradient")
    mixed_precision: str | None = _override(
        "Precision", "Half precision in trainings: no, bf16 or fp16", flag="--precision"
    )
    checkpoint_minutes: float = option(
        10.0, "Time between checkpoints", "Minutes between two checkpoints within an epoch", gt=0, **_TRAINING
    )
    trackers: list[str] = option(
        [],
        "Trackers",
        "Also send figures to this experiment tracker, such as tensorboard",
        flag="--tracker",
        **_TRAINING,
    )
    device: str | None = option(
        None, "Device", "Where to run, such as cpu or cuda:0; chosen automatically by default", **_TRAINING
    )
    seed: int = option(0, "Seed", "Seeds everything that is drawn at random", ge=0, **_TRAINING)

    k: int = option(20, "Choices per group", "Evenly spaced widths per channel group", ge=1, **_SPACE)
    bins: float | None = option(
        None,
        "FLOPs-sensitive bins",
        "Bins of about equal MACs instead of evenly spaced widths; so many channels in a bin of the most sensitive "
        "group (the first stage's)",
        gt=0,
        aliases=("beta",),
        **_SPACE,
    )
    min_width: str = option("0.1x", "Narrowest width", "A ratio such as 0.25x, or a number of channels", **_SPACE)
    max_width: str = option(
        "1x", "Widest width", "A ratio, or a number of channels; above 1x the supernet grows", **_SPACE
    )
    divisor: int = option(1, "Divisor", "Widths are multiples of this; 8 suits tensor cores", ge=1, **_SPACE)
    fixed: dict[str, int] = option({}, "Fixed widths", "Keep a channel group at one width", flag="--fix", **_SPACE)

    budget: str = option(
        "0.5x",
        "Budget",
        "What the slim network may cost: 0.5x, 2.0GMACs, 3.1Mparams, memory such as 12MB or 12MB@batch=16,bf16, "
        "latency such as 1.8ms@cuda:0,batch=8,channels_last; several with commas",
        **_SEARCH,
    )
    searcher: str = option(
        lambda: SEARCHERS.default,
        "Searcher",
        "How widths are searched; widthkit plugins lists the searchers",
        **_SEARCH,
    )
    searcher_options: dict[str, Any] = option(
        {}, "Searcher's options", "Option of the searcher; the value is JSON", flag="--searcher-option", **_SEARCH
    )
    search_images: int = option(
        2048, "Held-out images", "Most held-out images on which a candidate is judged", ge=1, **_SEARCH
    )
    criterion: Literal["loss", "accuracy"] = option(
        "loss", "Criterion", "What ranks candidates: their loss or, as in the papers, their accuracy", **_SEARCH
    )
    search_memory: str = option(
        "2GB",
        "Memory for sharing",
        "Most memory for what candidates that are judged together share",
        aliases=("memory",),
        **_SEARCH,
    )
    stand_alone_epochs: int | None = _override(
        "Epochs of a stand-alone training",
        "Each stand-alone training that a searcher asks for sees the data so many times",
        _SEARCH,
        ge=1,
    )
    stages: int = option(
        1,
        "Stages",
        "Search in so many stages: each starts from the widths that the last one found, with units ranked anew; with "
        "bins these get finer, without the network shrinks by equal ratios",
        ge=1,
        **_SEARCH,
    )
    alpha: float = option(
        2.0, "Refinement of bins", "From stage to stage bins get finer by this factor", gt=0, **_SEARCH
    )

    final_epochs: int | None = _override(
        "Epochs of final trainings", "Each final training sees the data so many times", _FINAL, ge=0
    )
    seeds: int = option(1, "Final trainings", "Trainings per compared network, each with another seed", ge=1, **_FINAL)
    init: Literal["scratch", "inherit"] | None = option(
        None,
        "Start of final trainings",
        "Start from fresh weights, or inherit the supernet's; inherit is the default where the run starts from trained "
        "weights or its widths are learned together with the weights, else scratch",
        **_FINAL,
    )
    distill: bool | None = option(
        None,
        "Teacher",
        "Let the dense network teach the smaller ones in their final trainings; by default it does if it is trained "
        "when the run starts",
        **_FINAL,
    )
    compare: list[str] = option(
        [], "Compared searchers", "Also train the widths of this searcher, which must propose one network", **_FINAL
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise refusal(error, run_options()) from None

    @field_validator("weights")
    @classmethod
    def _from_any_folder(cls, value: str | None) -> str | None:
        """Make the path absolute: a run may go on in another folder."""
        return None if value is None else str(Path(value).expanduser().absolute())

    def recipe_changes(self) -> dict[str, Any]:
        """Return the values that the options give to settings of the recipe, as :meth:`Recipe.changed` takes them."""
        values = {name: getattr(self, name) for name in IN_ALL_TRAININGS}
        values |= {setting: getattr(self, name) for name, setting in EPOCHS.items()}
        given = {name: value for name, value in values.items() if value is not None} | self.set
        return {name: None if value == NONE else value for name, value in given.items()}

    def resolved(self) -> Recipe:
        """Return the recipe with the values that the options give.

        Raises:
            OptionError: If there is no such recipe, or a setting is not known or makes no sense.

        >>> tuned = RunConfig(model="timm/resnet10t", data="digits", lr=0.1, set={"final.lr": 0.02}).resolved()
        >>> tuned.supernet.lr, tuned.final.lr, tuned.supernet.epochs
        (0.1, 0.02, 10)
        """
        found = recipe(self.recipe)
        options = {name: getattr(self, name) for name in found.options}
        return found.changed(self.recipe_changes()).model_copy(update={"options": options})

    def of(self, command: str) -> dict[str, Any]:
        """Return the values of the options that a command takes."""
        return {name: getattr(self, name) for name, declared in run_options().items() if command in declared.commands}

    def changed(self, values: Mapping[str, Any]) -> RunConfig:
        """Return a configuration with other values for some options."""
        return RunConfig(**{**self.model_dump(), **values})


@cache
def run_options() -> dict[str, RunOption]:
    """Return all options of a run by name, in the order in which they are shown."""
    return options_of(RunConfig)
