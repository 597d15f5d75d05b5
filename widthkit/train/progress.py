"""Show the progress of a training: a bar on a terminal, one plain line per epoch elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_COMMON = ("epoch", "loss", "accuracy", "lr", "images_per_s", "seconds")


class TrainingBar:
    """Shows updates and epochs on standard error; silent unless asked to show anything.

    Args:
        show: Whether to show anything.
        epochs: Number of epochs of the run.
        updates_per_epoch: Number of updates in an epoch, or ``None`` if not known.
        done: Epochs done before (a resumed run), as a fraction within one.
    """

    def __init__(self, show: bool, epochs: int, updates_per_epoch: int | None, done: float) -> None:
        self.epochs = epochs
        self.plain = show and not sys.stderr.isatty()
        self.bar = _rich_bar() if show and not self.plain else None
        if self.bar is not None:
            total = None if updates_per_epoch is None else epochs * updates_per_epoch
            completed = round(done * (updates_per_epoch or 0))
            self.task = self.bar.add_task("training", total=total, completed=completed, epoch="", figures="")

    def __enter__(self) -> TrainingBar:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, epoch: int) -> None:
        """Count one update of the epoch with index ``epoch``."""
        if self.bar is not None:
            self.bar.update(self.task, advance=1, epoch=f"epoch {epoch + 1}/{self.epochs}")

    def figures(self, entry: Mapping[str, float]) -> None:
        """Show loss, accuracy and speed beside the bar."""
        if self.bar is not None:
            self.bar.update(self.task, figures=describe(entry))

    def epoch_done(self, entry: Mapping[str, float]) -> None:
        """Show the figures of a whole epoch."""
        self.figures(entry)
        if self.plain:
            line = f"epoch {int(entry['epoch'])}/{self.epochs}  {describe(entry)}  lr {entry['lr']:.3g}"
            print(f"{line}{other_figures(entry)}  {entry['seconds']:.1f} s", file=sys.stderr, flush=True)


def describe(entry: Mapping[str, float]) -> str:
    """Write loss, accuracy and speed in a few words.

    >>> describe({"loss": 1.23456, "accuracy": 0.5, "images_per_s": 1234.5})
    'loss 1.2346  accuracy 50.00%  1234 images/s'
    >>> describe({"loss": 1.0, "accuracy": float("nan"), "images_per_s": 10.0})
    'loss 1.0000  10 images/s'
    """
    accuracy = "" if math.isnan(entry["accuracy"]) else f"accuracy {100 * entry['accuracy']:.2f}%  "
    return f"loss {entry['loss']:.4f}  {accuracy}{entry['images_per_s']:.0f} images/s"


def other_figures(entry: Mapping[str, float]) -> str:
    """Write the figures that a network added to those of every training.

    >>> other_figures({"loss": 1.0, "lr": 0.1, "policy_macs": 0.51234})
    '  policy_macs 0.512'
    """
    return "".join(f"  {name} {value:.3g}" for name, value in entry.items() if name not in _COMMON)


def _rich_bar() -> Any:
    return Progress(
        TextColumn("{task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
