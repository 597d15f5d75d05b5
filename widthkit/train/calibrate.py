"""Batch-norm statistics for sub-networks: recompute them, or use the batch's own.

A width that was trained with shared running statistics must not be judged with them (AutoSlim, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from widthkit.errors import DataError, OptionError
from widthkit.train.modes import (
    batch_size,
    call_model,
    checked_device,
    eval_mode,
    model_device,
    split_batch,
    training_flags,
)

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    batches: int | None = None,
    device: str | torch.device | None = None,
) -> int:
    """Recompute the running statistics of every batch norm as the plain mean over batches.

    The running mean becomes the mean of the batch means, the running variance the mean of the unbiased batch
    variances, each batch counting the same. Everything else runs in eval mode without gradients. Training flags and
    momenta are put back; if anything fails, so are the old statistics. A batch of one sample after larger ones is
    left out, for it has no variance of its own.

    Args:
        model: Any module; layers without running statistics are left alone.
        loader: Gives batches ``(inputs, targets)``; targets are not used.
        batches: How many batches to use; all when ``None``.
        device: Where to run; the model's own device when ``None``.

    Returns:
        The number of samples seen; 0, without reading any data, if there is nothing to recalibrate.

    Raises:
        OptionError: If ``batches`` is less than 1 or the device is not there.
        DataError: If the loader gives no batch.

    >>> net = nn.Sequential(nn.BatchNorm1d(1))
    >>> recalibrate(net, [(torch.tensor([[1.0], [3.0]]), None), (torch.tensor([[5.0], [9.0]]), None)])
    4
    >>> net[0].running_mean, net[0].running_var  # the means of (2, 7) and of (2, 8)
    (tensor([4.5000]), tensor([5.]))
    """
    if batches is not None and batches < 1:
        raise OptionError(f"batches={batches}: recalibration needs at least 1 batch; leave it out to use them all.")
    target = checked_device(device)
    norms = [norm for norm in _batch_norms(model) if norm.running_mean is not None]
    if not norms:
        return 0
    if target is not None:
        model.to(target)
    with _restored_on_error(norms), training_flags(model), torch.no_grad():
        momenta = [norm.momentum for norm in norms]
        try:
            _start_cumulative_mean(model, norms)
            images = _run_batches(model, islice(loader, batches), target or model_device(model))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return images


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let every batch norm use the statistics of the batch it sees; everything else is in eval mode.

    No running statistic has changed when the scope ends, and all training flags are as they were.

    Args:
        model: Any module.

    >>> net = nn.BatchNorm1d(1).eval()
    >>> with batch_statistics(net):
    ...     out = net(torch.tensor([[1.0], [3.0]]))
    >>> [round(value, 3) for value in out.flatten().tolist()], net.running_mean, net.training
    ([-1.0, 1.0], tensor([0.]), False)
    """
    norms = _batch_norms(model)
    saved = _saved_statistics(norms)
    with training_flags(model):
        try:
            eval_mode(model)
            for norm in norms:
                norm.training = True
            yield
        finally:
            # Copies, not a zero momentum or missing buffers: a module that slices its buffers must find them as usual.
            _put_back(saved)


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def _start_cumulative_mean(model: nn.Module, norms: list[_BatchNorm]) -> None:
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.training = True


def _run_batches(model: nn.Module, batches: Iterable[Any], device: torch.device) -> int:
    images = 0
    for batch in batches:
        inputs = send_to_device(split_batch(batch)[0], device)
        size = batch_size(inputs)
        if size > 1 or not images:
            call_model(model, inputs)
            images += size
    if not images:
        raise DataError("the loader gave no batch to recalibrate batch norm with; pass one that is not used up.")
    return images


def _saved_statistics(norms: list[_BatchNorm]) -> list[tuple[Tensor, Tensor]]:
    buffers = [getattr(norm, name, None) for norm in norms for name in _STATISTICS]
    return [(buffer, buffer.clone()) for buffer in buffers if buffer is not None]


def _put_back(saved: list[tuple[Tensor, Tensor]]) -> None:
    if saved:
        with torch.no_grad():
            torch._foreach_copy_([buffer for buffer, _ in saved], [before for _, before in saved])


@contextmanager
def _restored_on_error(norms: list[_BatchNorm]) -> Iterator[None]:
    saved = _saved_statistics(norms)
    try:
        yield
    except BaseException:
        _put_back(saved)
        raise
