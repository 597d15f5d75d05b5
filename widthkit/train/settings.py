"""The settings of a training run: checked before anything changes, and compared when a run is resumed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from typing import Any, Literal

import timm.optim
from pydantic import Field, field_validator, model_validator
from torch import nn

from widthkit.checked import CheckedSettings, Number, Share, Whole, refusal
from widthkit.errors import CheckpointError, DataError, Option, OptionError, close_matches
from widthkit.modules.structure import state_hash
from widthkit.train.losses import CrossEntropy

Schedule = Literal["constant", "linear", "cosine", "step", "milestones", "exponential", "plateau"]
Precision = Literal["no", "bf16", "fp16"]


class TrainSettings(CheckedSettings):
    """How a network is trained; every field is a keyword of :func:`widthkit.train`.

    Attributes:
        epochs: Epochs of the whole run.
        optimizer: A name of ``timm.optim.list_optimizers()``. As in timm, ``sgd`` has Nesterov momentum, ``momentum``
            is plain SGD.
        lr: Learning rate.
        weight_decay: Weight decay.
        decay_norms: Whether norms and biases have weight decay too.
        momentum: Momentum, for optimisers that have one.
        schedule: How the learning rate falls after the warm-up: ``cosine`` or ``linear`` (to ``min_lr``), ``step``
            (times ``decay`` after each third of the run), ``milestones`` (times ``decay`` after each of them),
            ``exponential`` (times ``decay`` every ``decay_epochs``), ``plateau`` (times ``decay`` after ``patience``
            epochs without a lower training loss) or ``constant``.
        warmup_epochs: Epochs, out of ``epochs``, in which the rate rises from ``lr / 100``.
        min_lr: The rate does not fall below this.
        milestones: Epochs after which the rate falls.
        decay: Factor by which it falls.
        decay_epochs: Epochs between two falls of ``exponential``; fractions are allowed.
        patience: Epochs that ``plateau`` waits.
        clip_grad: Largest norm of the whole gradient, or ``None``; narrow sub-networks of a fresh supernet have steep
            losses.
        accumulate: Batches per update; their gradients are averaged. The last update of an epoch takes what is left.
        mixed_precision: ``no``, ``bf16`` or ``fp16`` (GPU only).
        channels_last: Keep images and feature maps in the memory format that tensor cores prefer; the network's
            weights stay in it.
        label_smoothing: Share of a target's probability that is spread over all classes; cross entropy only.
        ema: Decay per update of an average of weights and floating buffers, which starts with the first update and
            which the network holds at the end of the run; ``None`` turns it off.
        teacher_weight: With a teacher, weight of its soft targets; the labels have the rest.
        temperature: Temperature of the soft targets (Hinton et al. 2015).
        feature_weight: With a teacher, weight of matching where its feature maps are large; 0 turns it off, 1000 is the
            value of Zagoruyko and Komodakis 2017.
    """

    epochs: Whole = Field(10, ge=1)
    optimizer: str = "sgd"
    lr: Number = Field(0.05, gt=0)
    weight_decay: Number = Field(1e-4, ge=0)
    decay_norms: bool = False
    momentum: Number = Field(0.9, ge=0)
    schedule: Schedule = "cosine"
    warmup_epochs: Whole = Field(0, ge=0)
    min_lr: Number = Field(0.0, ge=0)
    milestones: tuple[Whole, ...] = ()
    decay: Number = Field(0.1, gt=0, le=1)
    decay_epochs: Number = Field(1.0, gt=0)
    patience: Whole = Field(5, ge=0)
    clip_grad: Number | None = Field(5.0, gt=0)
    accumulate: Whole = Field(1, ge=1)
    mixed_precision: Precision = "no"
    channels_last: bool = False
    label_smoothing: Share = 0.0
    ema: Share | None = None
    teacher_weight: Number = Field(0.9, ge=0, le=1)
    temperature: Number = Field(4.0, gt=0)
    feature_weight: Number = Field(0.0, ge=0)

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, name: str) -> str:
        if name not in timm.optim.list_optimizers():
            raise refusal(f"unknown optimizer '{name}': {close_matches(name, timm.optim.list_optimizers())}")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        if 0 < self.epochs <= self.warmup_epochs:
            raise refusal(f"warmup_epochs={self.warmup_epochs} leaves no epoch of {self.epochs}; lower it.")
        if self.min_lr >= self.lr:
            raise refusal(f"min_lr={self.min_lr:g} is not below lr={self.lr:g}; lower it.")
        if (self.schedule == "milestones") != bool(self.milestones):
            raise refusal("schedule 'milestones' and the list of milestones need each other.")
        return self


def check_seed(seed: int) -> None:
    """Refuse what is no seed.

    Raises:
        OptionError: If so.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise OptionError(Option("seed"), f" must be a whole number of at least 0, not {seed!r}.")


def check_minutes(minutes: float) -> None:
    """Refuse what is no time between two checkpoints.

    Raises:
        OptionError: If so.
    """
    if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not minutes > 0:
        raise OptionError(Option("checkpoint_minutes"), f" must be a number greater than 0, not {minutes!r}.")


def check_loader(loader: Iterable[Any]) -> None:
    """Refuse a loader that is known to be empty, or is not iterable.

    Raises:
        DataError: If so.
    """
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise DataError(f"the loader is a {type(loader).__name__}, not an iterable of batches (inputs, targets).")
    if loader_length(loader) == 0:
        raise DataError("the loader has no batches; lower its batch size, or turn drop_last off.")


def loader_length(loader: Any) -> int | None:
    """Return the number of batches, or ``None`` where the loader cannot tell.

    >>> loader_length([1, 2]), loader_length(iter([1, 2]))
    (2, None)
    """
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:
        # A DataLoader over a stream has __len__, and raises.
        return None


def fingerprint(
    settings: TrainSettings,
    seed: int,
    net: nn.Module,
    loader: Any,
    loss: Any,
    teacher: nn.Module | None = None,
) -> dict[str, Any]:
    """Describe everything that a resumed run must have in common with the run it continues.

    Args:
        settings: The run's settings.
        seed: Its seed.
        net: The module to train.
        loader: The loader, as it was passed in.
        loss: The criterion.
        teacher: The network that it learns from, if there is one.

    Returns:
        Plain values by setting name, in a fixed order.
    """
    return {
        **settings.model_dump(),
        "seed": seed,
        "loss": _loss_name(loss),
        "model": type(net).__name__,
        # A supernet says here how it is trained.
        "model_options": net.extra_repr(),
        "shapes": {name: tuple(tensor.shape) for name, tensor in net.named_parameters()},
        "batches": loader_length(loader),
        "batch_size": getattr(loader, "batch_size", None),
        "teacher": None if teacher is None else state_hash(teacher)[:16],
    }


def check_same_run(path: Any, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to continue a run with other settings.

    Raises:
        CheckpointError: Naming the first setting that differs, with both values.
    """
    for name, value in wanted.items():
        if name not in stored or stored[name] != value:
            old, new = _difference(stored.get(name), value)
            raise CheckpointError(
                f"{path} is of a run with ",
                _shown(name, old),
                ", this one has ",
                _shown(name, new),
                "; use the old value, another ",
                Option("out"),
                ", or start without ",
                Option("resume"),
            )


def _shown(name: str, value: Any) -> str | Option:
    """Name a setting; a fingerprint also holds what is no option."""
    return Option(name, value) if name in {*TrainSettings.model_fields, "seed", "batch_size"} else f"{name}={value}"


def _difference(old: Any, new: Any) -> tuple[Any, Any]:
    """Narrow two mappings down to their first different entry, so that the message stays one line."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return old, new
    key = next((key for key in [*new, *old] if old.get(key) != new.get(key)), None)
    return f"{key}: {old.get(key)}", f"{key}: {new.get(key)}"


def _loss_name(loss: Any) -> str:
    if isinstance(loss, (nn.Module, CrossEntropy)):
        return " ".join(repr(loss).split())
    return getattr(loss, "__qualname__", type(loss).__name__)
