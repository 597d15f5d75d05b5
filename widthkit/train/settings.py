"""The settings of a training run: checked before anything changes, and compared when a run is resumed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sized
from dataclasses import asdict, dataclass, fields
from typing import Any

import timm.optim
from torch import nn

from widthkit.errors import CheckpointError, DataError, Option, OptionError, close_matches
from widthkit.train.losses import CrossEntropy

SCHEDULES = ("constant", "cosine", "step")
PRECISIONS = ("bf16", "fp16", "no")


@dataclass(frozen=True)
class Settings:
    """What :func:`widthkit.train.train` was asked to do; see there for the meaning of each."""

    epochs: int
    optimizer: str
    lr: float
    weight_decay: float
    momentum: float
    schedule: str
    warmup_epochs: int
    clip_grad: float | None
    mixed_precision: str
    seed: int

    def check(self) -> None:
        """Refuse settings that make no sense.

        Raises:
            OptionError: With the first setting that is wrong.

        >>> Settings(1, "sgd", 0.1, 0.0, 0.9, "cosin", 0, None, "no", 0).check()
        Traceback (most recent call last):
        widthkit.errors.OptionError: unknown schedule 'cosin': did you mean cosine?
        """
        _at_least("epochs", self.epochs, 1, whole=True)
        _at_least("warmup_epochs", self.warmup_epochs, 0, whole=True)
        _at_least("seed", self.seed, 0, whole=True)
        _at_least("weight_decay", self.weight_decay, 0)
        _at_least("momentum", self.momentum, 0)
        _above_zero("lr", self.lr)
        if self.clip_grad is not None:
            _above_zero("clip_grad", self.clip_grad)
        if self.warmup_epochs >= self.epochs:
            raise OptionError(f"warmup_epochs={self.warmup_epochs} leaves no epoch of {self.epochs}; lower it.")
        _check_name("optimizer", self.optimizer, timm.optim.list_optimizers())
        _check_name("schedule", self.schedule, SCHEDULES)
        _check_name("mixed_precision", self.mixed_precision, PRECISIONS)


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


def fingerprint(settings: Settings, net: nn.Module, loader: Any, loss: Any, processes: int) -> dict[str, Any]:
    """Describe everything that a resumed run must have in common with the run it continues.

    Args:
        settings: The run's settings.
        net: The module to train.
        loader: The loader, as it was passed in.
        loss: The criterion.
        processes: How many processes train together.

    Returns:
        Plain values by setting name, in a fixed order.
    """
    return {
        **asdict(settings),
        "loss": _loss_name(loss),
        "model": type(net).__name__,
        # A supernet says here how it is trained.
        "model_options": net.extra_repr(),
        "shapes": {name: tuple(tensor.shape) for name, tensor in net.named_parameters()},
        "batches": loader_length(loader),
        "batch_size": getattr(loader, "batch_size", None),
        "processes": processes,
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
    return Option(name, value) if name in {f.name for f in fields(Settings)} | {"batch_size"} else f"{name}={value}"


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


def _at_least(name: str, value: float, low: float, whole: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise OptionError(Option(name), f" must be {'a whole number' if whole else 'a number'}, not {value!r}.")
    if not (math.isfinite(value) and value >= low):
        raise OptionError(Option(name), f" must be at least {low}, not {value}.")


def _above_zero(name: str, value: float) -> None:
    _at_least(name, value, 0)
    if value == 0:
        raise OptionError(Option(name), " must be greater than 0.")


def _check_name(name: str, value: str, allowed: Iterable[str]) -> None:
    names = list(allowed)
    if value not in names:
        raise OptionError("unknown ", Option(name), f" '{value}': {close_matches(str(value), names)}")
