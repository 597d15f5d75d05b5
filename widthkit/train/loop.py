"""Train a network: epochs, updates, and the state that a checkpoint holds."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from widthkit.errors import DataError, ModelError, Option, OptionError
from widthkit.train import parallel
from widthkit.train.history import WidthHistory
from widthkit.train.losses import Loss, binding, count_correct
from widthkit.train.modes import batch_size, split_batch
from widthkit.train.optim import Schedule
from widthkit.train.precision import Precision
from widthkit.train.progress import TrainingBar
from widthkit.train.result import Totals, TrainResult, figures, write_run
from widthkit.train.rng import mix, seeded
from widthkit.train.settings import TrainSettings, loader_length
from widthkit.train.shards import seeded_order, shard
from widthkit.train.step import EndsEpochs, StepContext, TrainsItself, plain_step

_LOOK_EVERY = 20
"""Updates between two looks at the loss, because reading it makes a GPU wait."""


class Trainer:
    """A network in training, with all that a checkpoint must hold.

    Args:
        net: The module; it moves to the device here.
        loader: Gives batches; a ``DataLoader`` is divided among the processes.
        settings: How it is trained.
        seed: Seeds order, augmentation, dropout and the strategy's random choices.
        loss: The criterion.
        optimizer: A plain optimiser over the module's parameters.
        precision: The precision of forwards and gradients.
        device: Where to train.
    """

    def __init__(
        self,
        net: nn.Module,
        loader: Iterable[Any],
        settings: TrainSettings,
        seed: int,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        device: torch.device,
    ) -> None:
        self.net, self.settings, self.seed = net, settings, seed
        self.loss, self.bind = loss, binding(loss)
        self.optimizer, self.precision, self.device = optimizer, precision, device
        net.to(device)
        parallel.broadcast_module(net)
        self.loader = shard(loader)
        self.parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        self.schedule = Schedule(optimizer, settings)
        self.step: Callable[[StepContext], Tensor] = partial(plain_step, net)
        if isinstance(net, TrainsItself):
            self.step = net.train_step
        history = getattr(net, "width_history", None)
        self.widths = history if isinstance(history, WidthHistory) else None
        self.done, self.updates = 0, 0
        self.history: list[dict[str, float]] = []

    def state(self) -> dict[str, Any]:
        """Return everything that the next epoch depends on, and the history of widths."""
        return {
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.precision.state_dict(),
            "updates": self.updates,
            "widths": None if self.widths is None else self.widths.state_dict(),
        }

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Continue from a checkpoint of the same run."""
        state = stored["state"]
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.precision.load_state_dict(state["scaler"])
        if self.widths is not None and state.get("widths") is not None:
            self.widths.load_state_dict(state["widths"])
        self.updates, self.done, self.history = state["updates"], stored["done"], stored["history"]

    def fit(
        self,
        file: Path | None,
        fingerprint: Mapping[str, Any],
        progress: bool,
        on_epoch: Callable[[dict[str, float]], None] | None,
    ) -> TrainResult:
        """Train the remaining epochs; write a checkpoint after each if there is a ``file``.

        Raises:
            OptionError: If the loss or a weight is no longer finite; the module is as the last epoch left it.
            DataError: If the loader gives no batch, or something that is not a batch.
        """
        main = parallel.process_index() == 0
        updates = loader_length(self.loader)
        with TrainingBar(progress and main, self.settings.epochs, updates, self.done) as bar:
            while self.done < self.settings.epochs:
                entry = self._epoch_or_roll_back(bar)
                self.history.append(entry)
                if file is not None and main:
                    write_run(file, fingerprint, self.done, self.history, self.state())
                parallel.wait_for_all()
                bar.epoch_done(entry)
                if on_epoch is not None:
                    on_epoch(dict(entry))
        return TrainResult(self.done, self.history)

    def _epoch_or_roll_back(self, bar: TrainingBar) -> dict[str, float]:
        before = _snapshot(self.net)
        lr = self.schedule.lr
        try:
            entry = self._epoch(bar)
        except FloatingPointError as error:
            self.net.load_state_dict(before)
            if self.widths is not None:
                self.widths.drop_pending()
            raise OptionError(
                f"training diverged in epoch {self.done + 1}: {error}. The model is as the last epoch left it; lower ",
                Option("lr"),
                f" (now {self.settings.lr:g}) or ",
                Option("clip_grad"),
                f" (now {self.settings.clip_grad}).",
            ) from None
        finally:
            self.optimizer.zero_grad()
        self.done += 1
        self.schedule.after_epoch(entry["loss"])
        self.schedule.at(self.done)
        return {"epoch": self.done, "loss": entry["loss"], "accuracy": entry["accuracy"], "lr": lr, **entry}

    def _epoch(self, bar: TrainingBar) -> dict[str, float]:
        totals, start = Totals(self.device), time.perf_counter()
        seed = mix(self.seed, self.done)
        self.net.train()
        with seeded(mix(seed, parallel.process_index())), seeded_order(self.loader, seed, self.done):
            for count, batch in enumerate(self.loader, start=1):
                self._update(batch, totals)
                bar.advance(self.done)
                if count % _LOOK_EVERY == 0:
                    bar.figures(_finite_figures(totals, start))
        if totals.images == 0:
            raise DataError(f"the loader gave no batch in epoch {self.done + 1}; pass one that can be read repeatedly.")
        parallel.average_buffers(self.net)
        _check_weights(self.parameters)
        if self.widths is not None:
            self.widths.end_epoch()
        result = _finite_figures(totals, start)
        return {**result, **(self.net.end_epoch() if isinstance(self.net, EndsEpochs) else {})}

    def _update(self, batch: Any, totals: Totals) -> None:
        inputs, targets = send_to_device(split_batch(batch), self.device)
        context = self._context(inputs, targets)
        self.optimizer.zero_grad()
        try:
            loss = self.step(context)
        except ValueError as error:
            # As torch's batch norm raises it for a single value per channel.
            raise ModelError(
                f"{type(self.net).__name__} cannot be trained on a batch of {batch_size(inputs)} "
                f"({' '.join(str(error).split())}); take larger batches or images."
            ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ModelError(f"the training step of {type(self.net).__name__} must return one loss, a scalar tensor.")
        parallel.average_gradients(self.parameters)
        self.precision.update(self.optimizer, self.parameters, self.settings.clip_grad)
        self.updates += 1
        self.schedule.at(self._progress() * self.settings.epochs)
        totals.add(loss, count_correct(context.outputs, targets, self.loss), batch_size(inputs))

    def _context(self, inputs: Any, targets: Any) -> StepContext:
        seed = mix(self.seed, parallel.process_index(), self.updates)
        return StepContext(
            inputs=inputs,
            targets=targets,
            index=self.updates,
            epoch=self.done,
            loss=self.bind(inputs),
            backward=self.precision.backward,
            generator=torch.Generator().manual_seed(seed),
            amp=self.precision.autocast,
            progress=self._progress(),
        )

    def _progress(self) -> float:
        length = loader_length(self.loader)
        total = self.settings.epochs * (length or 0)
        return min(self.updates / total, 1.0) if total else self.done / self.settings.epochs


def _finite_figures(totals: Totals, start: float) -> dict[str, float]:
    """Read the sums over all processes, so that all of them stop together if the loss is not finite."""
    result = figures(parallel.sum_over_processes(totals.as_tensor()), time.perf_counter() - start)
    if not math.isfinite(result["loss"]):
        raise FloatingPointError(f"the loss is {result['loss']}")
    return result


def _check_weights(parameters: list[nn.Parameter]) -> None:
    """Refuse weights that are not finite; the last update of an epoch may spoil them after the last loss."""
    finite = torch.stack([parameter.detach().isfinite().all() for parameter in parameters]).all()
    if not finite.item():
        raise FloatingPointError("a weight is not finite")


def _snapshot(net: nn.Module) -> dict[str, Any]:
    """Copy a module's state to the memory of the CPU."""
    return {
        name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in net.state_dict().items()
    }
