"""The result of a training: the figures of every epoch, and the checkpoint from which it can be resumed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from widthkit.errors import CheckpointError, Option, OptionError
from widthkit.train.checkpoint import load_tree, save_tree
from widthkit.train.settings import check_same_run

FILE_NAME = "checkpoint.safetensors"


@dataclass(frozen=True)
class TrainResult:
    """The figures of a finished run.

    Attributes:
        epochs: Number of epochs trained, resumed parts of the run included.
        history: One entry per epoch: ``epoch`` (from 1), ``loss`` (mean over samples), ``accuracy`` (top-1 in
            ``[0, 1]``, NaN where the outputs are no class logits), ``lr`` (at the start of the epoch),
            ``images_per_s``, ``seconds``.

    >>> TrainResult(1, [{"epoch": 1, "loss": 0.5, "accuracy": 0.9, "seconds": 2.0}]).loss
    0.5
    """

    epochs: int
    history: list[dict[str, float]]

    @property
    def loss(self) -> float:
        """Mean training loss of the last epoch."""
        return self.history[-1]["loss"]

    @property
    def accuracy(self) -> float:
        """Training accuracy of the last epoch, in ``[0, 1]``; NaN where there is none."""
        return self.history[-1].get("accuracy", math.nan)

    @property
    def seconds(self) -> float:
        """Training time of all epochs."""
        return sum(entry["seconds"] for entry in self.history)


@dataclass
class Totals:
    """Sums over the samples of an epoch; they stay on the device, because reading them makes it wait."""

    device: torch.device
    images: int = 0
    scored: int = 0
    loss: Tensor = field(init=False)
    correct: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # Apple's devices have no double precision.
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        self.loss = torch.zeros((), dtype=kind, device=self.device)
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)

    def add(self, loss: Tensor, correct: Tensor | None, images: int) -> None:
        """Add one batch: its mean loss, its hits (``None`` where there is no accuracy), its number of samples."""
        self.images += images
        self.loss += loss.detach().reshape(()).to(self.loss) * images
        if correct is not None:
            self.scored += images
            self.correct += correct

    def as_tensor(self) -> Tensor:
        """Return ``(loss sum, hits, samples with hits counted, samples)`` as one tensor on the device."""
        counts = torch.tensor([self.scored, self.images], dtype=self.loss.dtype).to(self.device)
        return torch.cat([torch.stack([self.loss, self.correct.to(self.loss.dtype)]), counts])


def figures(sums: Tensor, seconds: float) -> dict[str, float]:
    """Turn sums (of one or all processes) into means.

    >>> figures(torch.tensor([6.0, 2.0, 4.0, 4.0]), 2.0)
    {'loss': 1.5, 'accuracy': 0.5, 'images_per_s': 2.0, 'seconds': 2.0}
    """
    loss, correct, scored, images = sums.tolist()
    return {
        "loss": loss / images if images else math.nan,
        "accuracy": correct / scored if scored else math.nan,
        "images_per_s": images / max(seconds, 1e-9),
        "seconds": seconds,
    }


def prepare_out(out: str | Path | None) -> Path | None:
    """Make the run's folder and return where its checkpoint goes.

    Raises:
        OptionError: If the folder cannot be made or written to.
    """
    if out is None:
        return None
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            f"cannot make the folder {out}: {error.strerror or error}; choose another ", Option("out")
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OptionError(f"cannot write into the folder {out}: permission denied; choose another ", Option("out"))
    return folder / FILE_NAME


def write_run(file: Path, fingerprint: Mapping[str, Any], done: int, history: list[Any], state: Any) -> None:
    """Write the checkpoint of a run after ``done`` epochs.

    Raises:
        CheckpointError: If it cannot be written; the one before is then still there.
    """
    save_tree(file, {"fingerprint": dict(fingerprint), "done": done, "history": history, "state": state})


def read_run(file: Path, fingerprint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the checkpoint of the run that has this fingerprint; ``None`` if there is no checkpoint yet.

    Raises:
        CheckpointError: If it is damaged, or of a run with other settings.
    """
    if not file.exists():
        return None
    stored = load_tree(file)
    if not isinstance(stored, dict) or set(stored) != {"fingerprint", "done", "history", "state"}:
        raise CheckpointError(f"{file} is not the checkpoint of a training run; choose another out folder.")
    wanted = dict(fingerprint)
    if stored["done"] >= fingerprint["epochs"]:
        del wanted["processes"]  # nothing is left to train, so the weights may be used by any number of processes
    check_same_run(file, stored["fingerprint"], wanted)
    return stored


def epochs_done(out: str | Path) -> int:
    """Return how many epochs of the run in a folder are done; 0 if there is no checkpoint.

    Raises:
        CheckpointError: If the checkpoint is damaged.
    """
    file = Path(out) / FILE_NAME
    if not file.exists():
        return 0
    stored = load_tree(file)
    if not isinstance(stored, dict) or not isinstance(stored.get("done"), int):
        raise CheckpointError(f"{file} is not the checkpoint of a training run; choose another out folder.")
    return int(stored["done"])
