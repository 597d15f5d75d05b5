"""The result of a training: the figures of every epoch, and the sums that they are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, as plain values and tensors on the CPU."""
        return {"images": self.images, "scored": self.scored, "loss": self.loss.cpu(), "correct": self.correct.cpu()}

    def add_state(self, state: Mapping[str, Any]) -> None:
        """Add what :meth:`state_dict` returned."""
        self.images += state["images"]
        self.scored += state["scored"]
        self.loss += state["loss"].to(self.device)
        self.correct += state["correct"].to(self.device)

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
