"""The data of a run, in the form that its model takes."""

from __future__ import annotations

from dataclasses import replace

from widthkit.errors import Option, OptionError
from widthkit.modules.inputs import InputForm, input_form
from widthkit.modules.models import create_model, input_channels
from widthkit.run.config import RunConfig
from widthkit.run.dense import factory_options, has_trained_weights
from widthkit.train import DataSplits, load_data

_SMALLEST_IMAGE = 32
"""Networks that halve their input five times have nothing left to see of an 8x8 image."""
_ANY_CLASSES = 1000
"""Classes of a model that is built before the data are known."""


def load_run_data(config: RunConfig) -> DataSplits:
    """Load the data in the form that the model's inputs have.

    Args:
        config: Names the data and the model.

    Raises:
        WidthkitError: If the model cannot be built, or the data cannot be read in this form.
    """
    outline = create_model(config.model, **factory_options(config, _ANY_CLASSES))
    channels = input_channels(outline)
    form = input_form(
        config.model,
        outline,
        channels,
        trained=has_trained_weights(config),
        mean=_values("mean", config.mean),
        std=_values("std", config.std),
    )
    if config.data.startswith("folder:"):
        size = config.image_size or (form.size and form.size[0])
        data = _read_data(config, size, channels, form, form.crop_pct)
    else:
        # Arrays hold what the model is to see: nothing is cut off.
        data = _read_data(config, config.image_size, channels, form, 1.0)
        if config.image_size is None and min(data.native_size) < _SMALLEST_IMAGE:
            data = _read_data(config, _SMALLEST_IMAGE, channels, form, 1.0)
    return data if form.mean is None else replace(data, inputs=replace(data.inputs, source=form.source))


def _read_data(config: RunConfig, image_size: int | None, channels: int, form: InputForm, crop: float) -> DataSplits:
    return load_data(
        config.data,
        data_dir=config.data_dir,
        image_size=image_size,
        in_channels=channels,
        seed=config.seed,
        limit=config.limit,
        mean=form.mean,
        std=form.std,
        crop=crop,
        interpolation=form.interpolation,
    )


def _values(name: str, text: str | None) -> tuple[float, ...] | None:
    """Read numbers with commas between them."""
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(Option(name, text), ": write numbers such as 0.485,0.456,0.406") from None
