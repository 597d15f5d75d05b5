"""Measure a module on a data set."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from widthkit.errors import DataError, OptionError, close_matches
from widthkit.train.calibrate import batch_statistics
from widthkit.train.losses import Loss, binding, count_correct, cross_entropy
from widthkit.train.modes import batch_size, call_model, checked_device, model_device, split_batch, training_flags
from widthkit.train.result import Totals, figures
from widthkit.train.settings import check_loader


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    loss: Loss | None = None,
    device: str | torch.device | None = None,
    statistics: str = "running",
) -> dict[str, float]:
    """Measure loss and accuracy, with no gradients and no lasting change to the model.

    Args:
        model: Any module.
        loader: Gives batches ``(inputs, targets)``.
        loss: ``(outputs, targets) -> scalar tensor``, a mean over the batch; cross entropy when ``None``. It gets the
            batch's inputs too if it has a parameter named ``inputs``.
        device: Where to run; the model moves there. Its own device when ``None``.
        statistics: ``running`` for batch norm's stored statistics, ``batch`` for each batch's own (see
            :func:`widthkit.train.batch_statistics`).

    Returns:
        ``loss`` (mean over samples), ``accuracy`` (top-1 in ``[0, 1]``, NaN where the outputs are no class logits)
        and ``images`` (number of samples).

    Raises:
        OptionError: If ``statistics`` or ``device`` is not known.
        DataError: If the loader gives no batch.

    >>> data = [(torch.eye(2), torch.tensor([0, 1])), (torch.eye(2)[:1], torch.tensor([1]))]
    >>> figures = evaluate(nn.Identity(), data)
    >>> round(figures["accuracy"], 4), figures["images"]
    (0.6667, 3)
    """
    if statistics not in ("running", "batch"):
        raise OptionError(f"unknown statistics '{statistics}': {close_matches(statistics, ['running', 'batch'])}")
    check_loader(loader)
    target = checked_device(device)
    if target is not None:
        model.to(target)
    mode = batch_statistics(model) if statistics == "batch" else _eval_mode(model)
    totals = _measure(model, loader, loss or cross_entropy(), target or model_device(model), mode)
    if totals.images == 0:
        raise DataError("the loader gave no batch to evaluate on; pass one that is not used up.")
    result = figures(totals.as_tensor(), 1.0)
    return {"loss": result["loss"], "accuracy": result["accuracy"], "images": totals.images}


def _measure(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Loss,
    device: torch.device,
    mode: AbstractContextManager[None],
) -> Totals:
    totals, bind = Totals(device), binding(loss)
    with mode, torch.no_grad():
        for batch in loader:
            inputs, targets = send_to_device(split_batch(batch), device)
            outputs = call_model(model, inputs)
            totals.add(bind(inputs)(outputs, targets), count_correct(outputs, targets, loss), batch_size(inputs))
    return totals


@contextmanager
def _eval_mode(model: nn.Module) -> Any:
    with training_flags(model):
        model.eval()
        yield
