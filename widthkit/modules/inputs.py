"""The form of a model's input images: normalisation, size, crop and interpolation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from widthkit.errors import ModelError, Option, OptionError
from widthkit.modules.structure import architecture

INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class InputForm:
    """What happens to images before a model sees them.

    Args:
        mean: Means per channel, as shares of 0..1; ``None`` where the data decide.
        std: Deviations, likewise.
        size: Height and width; ``None`` where the data decide.
        crop_pct: Images are resized to cover ``size / crop_pct``; their centre of ``size`` is kept.
        interpolation: ``bilinear`` or ``bicubic``, antialiased.
        source: Where the values come from, in words.

    >>> print(InputForm((0.5,), (0.25,), (28, 28), 1.0, "bilinear", "the training images"))
    mean 0.5, deviation 0.25, 28x28 pixels, crop 1, bilinear, from the training images
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    crop_pct: float = 1.0
    interpolation: str = "bilinear"
    source: str = "the data"

    def __str__(self) -> str:
        said = [f"mean {_numbers(self.mean)}"] if self.mean else []
        said += [f"deviation {_numbers(self.std)}"] if self.std else []
        said += [f"{self.size[0]}x{self.size[1]} pixels"] if self.size else []
        return ", ".join([*said, f"crop {self.crop_pct:.4g}", self.interpolation, f"from {self.source}"])


def input_form(
    name: str,
    model: nn.Module,
    channels: int,
    *,
    trained: bool,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> InputForm:
    """Decide the form of a model's inputs: given values first, then its own configuration, then the data.

    Args:
        name: The model's name, as in :func:`widthkit.create_model`.
        model: The model.
        channels: Channels of its images; a configuration for RGB is averaged for one.
        trained: Whether it has trained weights; without, its configuration says nothing about it.
        mean: Given means, as shares of 0..1, one per channel or one for all.
        std: Given deviations, likewise.

    Raises:
        OptionError: If ``mean`` or ``std`` is wrong.
        ModelError: If the model's configuration is for another number of channels.

    >>> import timm
    >>> input_form("timm/resnet18", timm.create_model("resnet18"), 3, trained=True).crop_pct
    0.95
    """
    given = check_normalisation(mean, std, channels)
    own = None
    if trained:
        # Given values make the configuration's number of channels irrelevant.
        own = own_form(name, model, None if given else channels)
    if given is None:
        return own or InputForm()
    rest = f"; size, crop and interpolation from {own.source}" if own else ""
    return replace(own or InputForm(), mean=given[0], std=given[1], source=f"the given mean and deviation{rest}")


def own_form(name: str, model: nn.Module, channels: int | None) -> InputForm | None:
    """Return the form that timm's or torchvision's configuration of trained weights states; ``None`` without one.

    Args:
        name: The model's name, as in :func:`widthkit.create_model`.
        model: The model.
        channels: Channels of its images; ``None`` leaves mean and deviation out.

    Raises:
        ModelError: If the configuration is for another number of channels.

    >>> form = own_form("torchvision/resnet18", nn.Identity(), 3)
    >>> form.mean, form.size, form.crop_pct, form.source
    ((0.485, 0.456, 0.406), (224, 224), 0.875, "torchvision's default weights of resnet18")
    """
    form = _timm_form(model) if architecture(model) else _torchvision_form(name)
    if form is None or channels is None:
        return form and replace(form, mean=None, std=None)
    assert form.mean is not None
    assert form.std is not None
    if len(form.mean) == channels:
        return form
    if channels != 1:
        raise ModelError(
            f"{form.source} is for {len(form.mean)} channels, the model takes {channels}; pass ",
            Option("mean"), " and ", Option("std"),
        )  # fmt: skip
    return replace(form, mean=_average(form.mean), std=_average(form.std), source=f"{form.source}, averaged for grey")


def check_normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Check given means and deviations.

    Args:
        mean: As shares of 0..1, one per channel or one for all.
        std: Likewise.
        channels: Channels of the images that the model takes.

    Returns:
        Both, one value per channel; ``None`` where neither is given.

    Raises:
        OptionError: If only one is given, or one has another number of values, or values that are no such shares.

    >>> check_normalisation([0.5], [0.25], 3)
    ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    """
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        there, lacking = ("std", "mean") if mean is None else ("mean", "std")
        raise OptionError(Option(there), " needs ", Option(lacking), " beside it")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise OptionError(Option(name), f" has {len(values)} values; the model takes {channels} channels")
        if not all(math.isfinite(v) and 0 <= v <= 1 for v in values) or (name == "std" and 0 in values):
            raise OptionError(
                Option(name), f" must be shares of 0..1{' above 0' if name == 'std' else ''}, not {_numbers(values)}; "
                "divide grey levels by 255",
            )  # fmt: skip
    means, deviations = (tuple(values) * (channels if len(values) == 1 else 1) for values in (mean, std))
    return means, deviations


def scaled(size: int, crop_pct: float) -> int:
    """Return the side length of which a crop keeps ``size``, as timm computes it.

    >>> scaled(224, 0.875), scaled(224, 0.95), scaled(32, 1.0)
    (256, 235, 32)
    """
    # The small number keeps 224 / (224 / 232) from becoming 231.
    return math.floor(size / crop_pct + 1e-6)


def _timm_form(model: nn.Module) -> InputForm:
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    source = f"timm's data config of {architecture(model)}"
    if config["crop_mode"] != "center":
        source += f" (cropped at the centre; its own crop mode is {config['crop_mode']})"
    return InputForm(
        tuple(config["mean"]),
        tuple(config["std"]),
        tuple(config["input_size"][-2:]),
        float(config["crop_pct"]),
        config["interpolation"],
        source,
    )


def _torchvision_form(name: str) -> InputForm | None:
    from torchvision import models

    library, _, rest = name.partition("/")
    # Detectors and other models normalise on their own or take no single images.
    if library != "torchvision" or rest not in models.list_models(module=models):
        return None
    transforms = models.get_model_weights(rest).DEFAULT.transforms()
    (side,), (whole,) = transforms.crop_size, transforms.resize_size
    return InputForm(
        tuple(transforms.mean),
        tuple(transforms.std),
        (side, side),
        side / whole,
        transforms.interpolation.value,
        f"torchvision's default weights of {rest}",
    )


def _average(values: tuple[float, ...]) -> tuple[float, ...]:
    return (sum(values) / len(values),)


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
