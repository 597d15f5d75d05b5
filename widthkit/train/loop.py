"""Train a network: epochs, updates, and the state that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from widthkit.errors import DataError, ModelError
from widthkit.train import parallel
from widthkit.train.finite import LOOK_EVERY, NotFinite, Seen, Watch
from widthkit.train.losses import Loss, binding, count_correct
from widthkit.train.modes import batch_size, channels_last, split_batch
from widthkit.train.position import Place
from widthkit.train.precision import Precision
from widthkit.train.progress import TrainingBar
from widthkit.train.result import Totals, TrainResult, figures
from widthkit.train.rng import mix, seeded
from widthkit.train.rollback import Start, diverged, replay_file, store_step
from widthkit.train.runfile import RunFiles
from widthkit.train.settings import TrainSettings, loader_length
from widthkit.train.shards import seeded_order, shard
from widthkit.train.state import TrainingState
from widthkit.train.step import EndsEpochs, FollowsUpdates, StepContext, TrainsItself, plain_step

Listener = Callable[[dict[str, float]], None]


class Trainer(TrainingState):
    """Trains a network.

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
        net.to(device)
        if settings.channels_last:
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        parallel.broadcast_module(net)
        self.loader = shard(loader)
        super().__init__(net, loader_length(self.loader), settings, optimizer, precision, device)
        self.seed, self.loss, self.bind = seed, loss, binding(loss)
        self.parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        self.step: Callable[[StepContext], Tensor] = partial(plain_step, net)
        if isinstance(net, TrainsItself):
            self.step = net.train_step
        self.watch = Watch(device)
        self._waiting = 0  # batches since the last update
        self._due = False  # a checkpoint, after this update

    # --- epochs -------------------------------------------------------------------------------------------------------

    def fit(self, files: RunFiles | None, progress: bool, listeners: Sequence[Listener]) -> TrainResult:
        """Train the rest of the run; write checkpoints if there are ``files``.

        Raises:
            OptionError: If the loss or a weight is no longer finite; the module is as the last epoch left it.
            DataError: If the loader gives no batch, or something that is not a batch.
        """
        if files is not None and 0 < self.done < self.settings.epochs:
            files.write_metrics(self.history)
        shown = progress and parallel.process_index() == 0
        with TrainingBar(shown, self.settings.epochs, self.length, self.position) as bar:
            while self.done < self.settings.epochs:
                entry = self._epoch_or_roll_back(files, bar)
                if files is not None:
                    files.write(self.stored())
                parallel.wait_for_all()
                bar.epoch_done(entry)
                for listener in listeners:
                    listener(dict(entry))
        if self.average is not None:
            self.average.copy_to(self.net)
        return TrainResult(self.done, self.history)

    def _epoch_or_roll_back(self, files: RunFiles | None, bar: TrainingBar) -> dict[str, float]:
        start = Start(self.net, self.widths, self.updates, resumed=self.here.batches > 0)
        try:
            found = self._epoch(files, bar)
        except NotFinite as error:
            stored = None if files is None else self._store_step(error, start, files)
            start.put_back()
            raise diverged(error, self.done + 1, start, stored, self.settings) from None
        finally:
            self.optimizer.zero_grad()
        self.done += 1
        entry = {"epoch": self.done, "loss": found["loss"], "accuracy": found["accuracy"], "lr": self.here.lr, **found}
        self.history.append(entry)
        self.schedule.after_epoch(entry["loss"])
        self.schedule.at(self.done)
        self.here, self._due = Place(Totals(self.device), self.schedule.lr), False
        return entry

    def _epoch(self, files: RunFiles | None, bar: TrainingBar) -> dict[str, float]:
        here = self.here
        here.begin()
        self.net.train()
        with self._order():
            for batch in here.rest(self.loader, self.device):
                self._learn(batch)
                bar.advance(self.done)
                if here.batches % self.watch.every == 0:
                    self._look(files)
                if here.batches % LOOK_EVERY == 0:
                    bar.figures(self._figures())
                if self._waiting == self.settings.accumulate:
                    self._update()
                    self._save_if_due(files)
            if not here.batches:
                raise DataError(
                    f"the loader gave no batch in epoch {self.done + 1}; pass one that can be read repeatedly."
                )
            if here.batches % self.watch.every:
                self._look(files)
            if self._waiting:
                self._update()
        parallel.average_buffers(list(self.buffers().values()))
        self.watch.check_weights(self.parameters)
        if self.widths is not None:
            self.widths.end_epoch()
        return {**self._figures(), **(self.net.end_epoch() if isinstance(self.net, EndsEpochs) else {})}

    @contextmanager
    def _order(self) -> Iterator[None]:
        """Make order and random choices follow from the epoch's number."""
        seed = mix(self.seed, self.done)
        with seeded(mix(seed, parallel.process_index())), seeded_order(self.loader, seed, self.done):
            yield

    def _figures(self) -> dict[str, float]:
        return figures(parallel.sum_over_processes(self.here.totals.as_tensor()), self.here.elapsed)

    def _save_if_due(self, files: RunFiles | None) -> None:
        if files is not None and self._due:
            self._due = False
            files.write(self.stored())

    # --- batches ------------------------------------------------------------------------------------------------------

    def _learn(self, batch: Any) -> None:
        """Add the gradients of one batch."""
        inputs, targets = send_to_device(split_batch(batch), self.device)
        if self.settings.channels_last:
            inputs = channels_last(inputs)
        context = self._context(inputs, targets)
        if self._waiting == 0:
            self.optimizer.zero_grad()
        if self.widths is not None:
            self.widths.begin_step()
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
        widths = [] if self.widths is None else self.widths.of_step
        data = (inputs, targets) if self.watch.at_once else None
        self.watch.note(Seen(self.updates, self.here.batches, loss, widths, data))
        self.here.totals.add(loss, count_correct(context.outputs, targets, self.loss), batch_size(inputs))
        self.here.batches += 1
        self.batches += 1
        self._waiting += 1

    def _update(self) -> None:
        """Change the weights by the mean gradient of the batches since the last update."""
        if self._waiting > 1:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad /= self._waiting
        parallel.average_gradients(self.parameters)
        self.precision.update(self.optimizer, self.parameters, self.settings.clip_grad)
        if isinstance(self.net, FollowsUpdates):
            self.net.after_update()
        if self.average is not None:
            self.average.update(self.net)
        self.updates += 1
        self._waiting = 0
        self.schedule.at(self.position)

    def _context(self, inputs: Any, targets: Any) -> StepContext:
        seed = mix(self.seed, parallel.process_index(), self.batches)
        return StepContext(
            inputs=inputs,
            targets=targets,
            index=self.updates,
            epoch=self.done,
            loss=self.bind(inputs),
            backward=self.precision.backward,
            generator=torch.Generator().manual_seed(seed),
            amp=self.precision.autocast,
            progress=self.position / self.settings.epochs,
        )

    # --- what is not finite -------------------------------------------------------------------------------------------

    def _look(self, files: RunFiles | None) -> None:
        if self.watch.look(self.parameters, files is not None and files.due()):
            self._due = True

    def _store_step(self, error: NotFinite, start: Start, files: RunFiles) -> str:
        """Write a step that was not finite to a file; every process must call this."""
        seen = self.watch.last
        data = None if self.watch.at_once else self._read_again(error.batch)
        if seen is None:
            return "no batch was read"
        if error.process != parallel.process_index():
            return f"{replay_file(files.folder, error.update)} has its batch"
        inputs, targets = seen.data or data or (None, None)
        current = self.updates == seen.update
        content = {
            "what": str(error),
            "inputs": inputs,
            "targets": targets,
            "update": seen.update,
            "epoch": self.done,
            "batch": seen.batch,
            "process": error.process,
            "seed": self.seed,
            "widths": seen.widths,
            "weights": self.net.state_dict() if current else start.state,
            "weights_before_update": seen.update if current else start.updates,
        }
        return store_step(files.folder, error.update, content)

    def _read_again(self, batch: int) -> Any:
        """Read a batch of this epoch once more; its augmentation may be drawn differently."""
        if isinstance(self.loader, Iterator):
            return None
        with self._order():
            found = next(islice(iter(self.loader), batch, None), None)
        return None if found is None else split_batch(found)
