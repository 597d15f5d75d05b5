"""What a run does when it diverges: store the step for replay, put the module back, say what happened."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from widthkit.errors import CheckpointError, Option, OptionError
from widthkit.train.checkpoint import save_tree
from widthkit.train.finite import NotFinite
from widthkit.train.history import WidthHistory
from widthkit.train.settings import TrainSettings


class Start:
    """A network at the start of an epoch, or where a resumed run goes on within one.

    Args:
        net: The network; its state is copied to the memory of the CPU.
        widths: Its record of trained widths, if it has one.
        updates: Number of updates done.
        resumed: Whether this is within an epoch.
    """

    def __init__(self, net: nn.Module, widths: WidthHistory | None, updates: int, resumed: bool) -> None:
        self.state = {
            name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
            for name, value in net.state_dict().items()
        }
        self._net, self._widths, self.updates, self.resumed = net, widths, updates, resumed
        self._records = None if widths is None else widths.state_dict()

    def put_back(self) -> None:
        """Give the network the state that it had here."""
        self._net.load_state_dict(self.state)
        if self._widths is not None and self._records is not None:
            self._widths.load_state_dict(self._records)


def store_step(folder: Path, update: int, content: dict[str, Any]) -> str:
    """Write ``not-finite-UPDATE.safetensors`` and say where it is, or why it is not there."""
    file = replay_file(folder, update)
    try:
        save_tree(file, content)
    except CheckpointError as error:
        return f"{file.name} could not be written: {str(error).rstrip('.')}"
    return f"{file} has its batch"


def replay_file(folder: Path, update: int) -> Path:
    """Return the file for a step that was not finite."""
    return folder / f"not-finite-{update}.safetensors"


def diverged(error: NotFinite, epoch: int, start: Start, stored: str | None, settings: TrainSettings) -> OptionError:
    """Make the line that ends a run which diverged.

    Args:
        error: What was not finite.
        epoch: The epoch, from 1.
        start: Where the network has been put back to.
        stored: Where the step is stored, if the run has a folder.
        settings: The run's settings.
    """
    left = "checkpoint" if start.resumed else "epoch"
    return OptionError(
        f"training diverged in epoch {epoch}, after {error.update} updates of the run: {error}. The model is as the "
        f"last {left} left it; {'' if stored is None else f'{stored}; '}lower ",
        Option("lr"),
        f" (now {settings.lr:g}) or ",
        Option("clip_grad"),
        f" (now {settings.clip_grad}).",
    )
