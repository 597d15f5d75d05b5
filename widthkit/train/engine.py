"""Train any module, or a supernet that trains itself, with timm's optimisers and schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from widthkit.checked import checked
from widthkit.errors import Option, OptionError
from widthkit.train.launch import join
from widthkit.train.loop import Trainer
from widthkit.train.losses import Loss, cross_entropy
from widthkit.train.modes import checked_device, training_flags
from widthkit.train.optim import make_optimizer
from widthkit.train.precision import Precision
from widthkit.train.result import TrainResult
from widthkit.train.runfile import RunFiles, prepare_out
from widthkit.train.settings import TrainSettings, check_loader, check_minutes, check_seed, fingerprint
from widthkit.train.teacher import Teacher
from widthkit.train.trackers import check_trackers, tracking


def train(
    net: nn.Module,
    loader: Iterable[Any],
    epochs: int,
    *,
    loss: Loss | None = None,
    teacher: nn.Module | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    checkpoint_minutes: float = 10.0,
    trackers: Sequence[str] = (),
    **settings: Any,
) -> TrainResult:
    """Train ``net`` in place.

    A module with a method ``train_step(step: StepContext) -> Tensor`` (a supernet) runs its own forwards and
    backwards; any other gets one forward and one backward per batch. A method ``end_epoch() -> dict[str, float]`` is
    called after every epoch, and its figures join the history. Started with ``torchrun``, the processes divide
    each epoch of a ``DataLoader`` and average their gradients; other loaders must differ per process by themselves.

    The state of the user's random generators is the same afterwards, and so are all training flags. A resumed run
    gives the same weights as one that was never stopped (on one machine, as far as its kernels are deterministic, with
    as many processes as before). Within an epoch the loader is read again, and the batches seen already are dropped.
    With another number of processes the run goes on at the same share of the epoch. The module stays on the device it
    was trained on.

    A loss, gradient or weight that is not finite stops the run: at that step on the CPU, within 20 batches on an
    accelerator, which would have to wait for it. ``not-finite-UPDATE.safetensors`` in ``out`` then holds the step, for
    :func:`widthkit.train.checkpoint.load_tree`: ``what`` was not finite; ``inputs`` and ``targets`` (on an accelerator
    read again from the loader, so augmentation may differ; ``None`` if that cannot be done); ``update``, ``epoch`` and
    ``batch`` (in the epoch), all counted from 0; ``process``, ``seed``; ``widths``, those that a supernet trained and
    recorded in this step; ``weights``, as they were before update ``weights_before_update``, which is the step's own
    on the CPU and the epoch's first one elsewhere.

    Args:
        net: The module; what does not require a gradient is not trained.
        loader: Gives batches ``(inputs, targets)``: a ``DataLoader``, or anything that can be iterated once per
            epoch. Inputs are a tensor, a tuple (positional) or a dict (keywords).
        epochs: Number of epochs of the whole run, at least 1.
        loss: ``(outputs, targets) -> scalar tensor``; cross entropy when ``None``. It is called with ``inputs=`` too if
            it has a parameter of that name (beside its first two).
        teacher: A trained network to learn from as well, for tasks whose outputs are class logits ``(N, C)`` or
            ``(N, C, ...)``: its soft targets have the weight ``teacher_weight``, at ``temperature``, and
            ``feature_weight`` matches feature maps. It sees every batch once, as the network does, in eval mode. The
            run works on a copy of it. The loss shown is then that of labels and teacher together; of a network that
            trains itself it is what its step returns: supernets return losses on the targets, which compare widths.
        device: Such as ``cpu`` or ``cuda:1``; an accelerator if there is one when ``None``, else the CPU.
        seed: Seed of data order, augmentation, dropout and the strategy's random choices.
        out: Folder for ``checkpoint.safetensors``, written after every epoch and every ``checkpoint_minutes``, the one
            before it, ``checkpoint-before.safetensors``, and ``metrics.jsonl``, one line per epoch. Nothing is written
            when ``None``.
        resume: Continue from the checkpoint in ``out``, or from the one before if it is damaged; start from scratch if
            there is none. A finished run returns at once, with its stored weights in ``net``.
        progress: Show a bar on a terminal, else one line per epoch, on standard error.
        on_epoch: Called after every epoch, in every process, with that epoch's entry of the history.
        checkpoint_minutes: Time between two checkpoints within an epoch.
        trackers: Experiment trackers that are told every epoch's figures, by Accelerate's names such as
            ``tensorboard``; a resumed run tells them the earlier epochs again.
        **settings: Optimiser, schedule and the rest: the fields of :class:`widthkit.train.TrainSettings`.

    Returns:
        The figures of all epochs, those before a resume included.

    Raises:
        OptionError: If an option makes no sense (nothing has changed then), or if the loss or a weight became
            infinite or NaN (the module is then as the last epoch left it).
        DataError: If the loader is empty or gives something that is not a batch.
        ModelError: If there is nothing to train, or the outputs do not fit the loss or the teacher.
        CheckpointError: If all checkpoints are damaged, of a run with other settings, or cannot be written.

    >>> net = nn.Linear(2, 2)
    >>> batches = [(torch.eye(2), torch.tensor([0, 1]))] * 10
    >>> result = train(net, batches, 4, lr=0.5, device="cpu", progress=False)
    >>> result.accuracy, [round(entry["lr"], 3) for entry in result.history]
    (1.0, [0.5, 0.427, 0.25, 0.073])
    """
    how = checked(TrainSettings, {"epochs": epochs, **settings})
    check_seed(seed)
    check_minutes(checkpoint_minutes)
    check_trackers(trackers, out)
    check_loader(loader)
    target = checked_device(device)
    made = make_optimizer(net, how)
    criterion = _criterion(loss, how)
    place = join(target)
    precision = Precision(how.mixed_precision, place)
    leader = None if teacher is None else Teacher(teacher, net, how, place)
    with training_flags(net):
        mark = fingerprint(how, seed, net, loader, criterion, teacher)
        files = None if out is None else RunFiles(prepare_out(out), mark, checkpoint_minutes)
        # Read and compared before the module moves or changes.
        stored = files.read() if resume and files is not None else None
        trainer = Trainer(net, loader, how, seed, criterion, made, precision, place)
        if leader is not None:
            trainer.step = leader.leading(trainer.step)
        if stored is not None:
            trainer.restore(stored)
        with tracking(trackers, out, {**how.model_dump(), "seed": seed}, place.type == "cpu") as tell:
            for entry in trainer.history:
                tell(entry)
            return trainer.fit(files, progress, [tell, *([] if on_epoch is None else [on_epoch])])


def check_engine(mixed_precision: str, device: str | torch.device | None) -> None:
    """Refuse a device or precision that :func:`train` could not use on this machine; nothing is changed.

    Raises:
        OptionError: If so.

    >>> check_engine("fp16", "cpu")
    Traceback (most recent call last):
    widthkit.errors.OptionError: mixed_precision='fp16' cannot be used on a CPU; take 'no' or 'bf16'.
    """
    Precision(mixed_precision, join(checked_device(device)))


def _criterion(loss: Loss | None, settings: TrainSettings) -> Loss:
    if loss is None:
        return cross_entropy(settings.label_smoothing)
    if settings.label_smoothing:
        raise OptionError(Option("label_smoothing", settings.label_smoothing), " goes with the default loss only.")
    return loss
