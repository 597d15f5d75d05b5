"""The state of a run: all that its next update depends on, and what a checkpoint holds of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from widthkit.train import parallel
from widthkit.train.average import Average
from widthkit.train.history import WidthHistory
from widthkit.train.optim import Schedule, load_optimizer
from widthkit.train.position import Place, place_of
from widthkit.train.precision import Precision
from widthkit.train.result import Totals
from widthkit.train.settings import TrainSettings


class TrainingState:
    """A network in training, and how far its run is.

    Args:
        net: The module, on the device.
        length: Batches per epoch and process, or ``None`` if not known.
        settings: How it is trained.
        optimizer: A plain optimiser over the module's parameters.
        precision: The precision of forwards and gradients.
        device: Where to train.

    Attributes:
        schedule: Sets the learning rate.
        average: The average of the weights, if the settings ask for one.
        widths: The network's record of trained widths, if it has one.
        done: Epochs done.
        updates: Updates done.
        batches: Batches of this process done.
        history: One entry per epoch.
        here: How far the epoch is.
    """

    def __init__(
        self,
        net: nn.Module,
        length: int | None,
        settings: TrainSettings,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        device: torch.device,
    ) -> None:
        self.net, self.length, self.settings = net, length, settings
        self.optimizer, self.precision, self.device = optimizer, precision, device
        self.schedule = Schedule(optimizer, settings)
        self.average = None if settings.ema is None else Average(net, settings.ema)
        history = getattr(net, "width_history", None)
        self.widths = history if isinstance(history, WidthHistory) else None
        self.done, self.updates, self.batches = 0, 0, 0
        self.history: list[dict[str, float]] = []
        self.here = Place(Totals(device), self.schedule.lr)

    @property
    def position(self) -> float:
        """Epochs done so far; within an epoch a fraction, where the loader knows its length."""
        return self.done + (min(self.here.batches / self.length, 1.0) if self.length else 0)

    def stored(self) -> dict[str, Any]:
        """Return all that a resumed run needs; every process must call this, after a whole update."""
        within = self.here.batches > 0
        if within and self.widths is not None:
            self.widths.end_epoch()
        return {
            "done": self.done,
            "history": self.history,
            "processes": parallel.processes(),
            "within": self.here.state_dict(self.buffers(), self.length) if within else None,
            "state": {
                "model": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": self.precision.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "updates": self.updates,
                "batches": self.batches,
                "widths": None if self.widths is None else self.widths.state_dict(),
            },
        }

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Continue from a checkpoint of the same run."""
        state = stored["state"]
        self.net.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.precision.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.widths is not None:
            self.widths.load_state_dict(state["widths"])
        self.updates, self.batches = state["updates"], state["batches"]
        self.done, self.history = stored["done"], stored["history"]
        self.schedule.at(self.done)
        self.here = Place(Totals(self.device), self.schedule.lr)
        if stored["within"] is not None:
            self.here = place_of(stored["within"], self.buffers(), self.length, self.device)
            self.schedule.at(self.position)
        before, now = stored["processes"], parallel.processes()
        if before != now and self.done < self.settings.epochs and parallel.process_index() == 0:
            noun = "process" if now == 1 else "processes"
            print(f"the run goes on with {now} {noun}, it had {before} before", file=sys.stderr, flush=True)

    def buffers(self) -> dict[str, Tensor]:
        """Name what differs between processes within an epoch."""
        found = {f"net.{name}": buffer for name, buffer in self.net.named_buffers()}
        if self.average is not None:
            found |= {f"average.{name}": self.average.tensors[name] for name, _ in self.net.named_buffers()}
        return found
