"""Recipes: how the supernet, stand-alone networks and final networks of a run are trained, as YAML and in Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator

from widthkit.checked import CheckedSettings, Whole, checked
from widthkit.errors import OptionError, close_matches, one_line
from widthkit.train.augment import AnyAugmentation, Augmentation, spelled_out
from widthkit.train.settings import TrainSettings

TRAININGS = ("supernet", "calibration", "final")
COMMON = "common"
_SHIPPED = files("widthkit") / "recipes"


class TrainingRecipe(TrainSettings):
    """How one kind of network is trained: the settings of :class:`widthkit.train.TrainSettings`, and its batches.

    Attributes:
        epochs: Epochs of the whole training; 0 leaves the network as it is.
        batch_size: Images per batch.
        augment: What happens to its images at random; ``True`` and ``False`` as in :func:`widthkit.load_data`.
    """

    epochs: Whole = Field(default=10, ge=0)
    batch_size: Whole = Field(default=128, ge=1)
    augment: AnyAugmentation = Augmentation()

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        # YAML reads no as false.
        return "no" if value is False else value

    def keywords(self) -> dict[str, Any]:
        """Return the settings that are keywords of :func:`widthkit.train`; epochs are a positional argument."""
        return {name: getattr(self, name) for name in TrainSettings.model_fields if name != "epochs"}


class Recipe(CheckedSettings):
    """The trainings of a run.

    Attributes:
        about: What the recipe is for, in one line.
        source: Where its values come from.
        options: Options of a run that go with it, such as a strategy; they count where the user gives none.
        supernet: The training of the supernet.
        calibration: Stand-alone trainings that a searcher asks for.
        final: Trainings of the networks that are compared in the end.

    >>> tuned = recipe("default").changed({"lr": 0.1, "final.lr": 0.02, "augment.flip": True})
    >>> tuned.supernet.lr, tuned.final.lr, tuned.final.augment.flip
    (0.1, 0.02, True)
    """

    about: str
    source: str
    options: dict[str, Any] = Field(default={})
    supernet: TrainingRecipe
    calibration: TrainingRecipe
    final: TrainingRecipe

    def changed(self, values: Mapping[str, Any]) -> Recipe:
        """Return the recipe with other values.

        Args:
            values: By setting: ``final.lr`` for one training, ``lr`` or ``common.lr`` for all three;
                ``augment.mixup`` changes one part of the augmentation. What is said of one training counts more than
                what is said of all.

        Raises:
            OptionError: If a setting is not known or makes no sense.
        """
        form: dict[str, Any] = {}
        for path, value in values.items():
            section, *rest = path.split(".")
            if section not in (COMMON, *TRAININGS):
                section, rest = COMMON, [section, *rest]
            for part in reversed(rest):
                value = {part: value}
            form[section] = _merged(form.get(section, {}), value)
        return _filled(self.model_dump(), form)

    def to_yaml(self) -> str:
        """Return all values as YAML, which :func:`recipe` reads."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120))

    def differences(self, other: Recipe) -> Iterator[tuple[str, Any, Any]]:
        """Yield the settings in which another recipe differs, with both values."""
        for name in TRAININGS:
            one, two = getattr(self, name), getattr(other, name)
            for key in TrainingRecipe.model_fields:
                if getattr(one, key) != getattr(two, key):
                    yield f"{name}.{key}", getattr(one, key), getattr(two, key)


class _Form(CheckedSettings):
    """The form of a file."""

    about: str = ""
    source: str = ""
    options: dict[str, Any] = Field(default={})
    common: dict[str, Any] = Field(default={})
    supernet: dict[str, Any] = Field(default={})
    calibration: dict[str, Any] = Field(default={})
    final: dict[str, Any] = Field(default={})


def recipes() -> tuple[str, ...]:
    """Return the names of the recipes that come with widthkit.

    >>> "default" in recipes()
    True
    """
    return tuple(sorted(file.name.removesuffix(".yaml") for file in _SHIPPED.iterdir() if file.name.endswith(".yaml")))


def is_file(name: str | Path) -> bool:
    """Whether a recipe is named by its file."""
    return str(name).endswith((".yaml", ".yml"))


def recipe(name: str | Path) -> Recipe:
    """Read a recipe.

    Args:
        name: One of :func:`recipes`, or a file ``FILE.yaml``.

    Raises:
        OptionError: If there is no such recipe, or one of its settings is not known or makes no sense.

    >>> recipe("default").final.epochs
    10
    >>> recipe("defualt")
    Traceback (most recent call last):
    widthkit.errors.OptionError: unknown recipe 'defualt': did you mean default? A file of your own ends in .yaml.
    """
    if not is_file(name):
        if name not in recipes():
            raise OptionError(
                f"unknown recipe '{name}': {close_matches(str(name), recipes())} A file of your own ends in .yaml."
            )
        return _read(_SHIPPED.joinpath(f"{name}.yaml").read_text(encoding="utf-8"), str(name))
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"the recipe {name} cannot be read: {one_line(error)}") from error
    return _read(text, str(name))


def _read(text: str, where: str) -> Recipe:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise OptionError(f"the recipe {where} is no YAML: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise OptionError(f"the recipe {where} must hold settings by name, such as 'final: {{lr: 0.01}}'.")
    try:
        return _filled({name: {} for name in TRAININGS}, values)
    except OptionError as error:
        raise OptionError(f"{where}: ", *error.args) from None


def _filled(base: Mapping[str, Any], values: Mapping[Any, Any]) -> Recipe:
    """Put the values of a file into a recipe.

    Raises:
        OptionError: If one is not known or makes no sense.
    """
    form = checked(_Form, {str(name): value for name, value in values.items()})
    shared = _known(COMMON, form.common)
    merged = {name: _merged(_merged(base[name], shared), _known(name, getattr(form, name))) for name in TRAININGS}
    texts = {name: values.get(name, base.get(name, "")) for name in ("about", "source")}
    return checked(Recipe, {**texts, "options": {**base.get("options", {}), **form.options}, **merged})


def _known(section: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuse unknown names under the section that has them; later nobody knows which one that was."""
    kinds: list[tuple[str, Any, type[CheckedSettings]]] = [(section, values, TrainingRecipe)]
    kinds.append((f"{section}.augment", values.get("augment"), Augmentation))
    for place, given, kind in kinds:
        for name in given if isinstance(given, Mapping) else ():
            if name not in kind.model_fields:
                known = close_matches(str(name), kind.model_fields)
                raise OptionError(f"unknown setting '{place}.{name}': {known}")
    return values


def _merged(base: Any, over: Any) -> Any:
    """Return the settings of one training with others over them; an augmentation's are merged, too."""
    if not isinstance(base, Mapping) or not isinstance(over, Mapping):
        return over
    merged, augment = {**base, **over}, spelled_out(base.get("augment"))
    if isinstance(augment, Mapping) and isinstance(over.get("augment"), Mapping):
        merged["augment"] = {**augment, **over["augment"]}
    return merged
