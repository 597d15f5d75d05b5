"""The few collectives that let several processes train one network exactly.

The network is not wrapped in ``DistributedDataParallel``: a supernet's step runs several sub-networks forwards and
backwards, which use different parameters on different processes. Averaging the finished gradients is exact for any
such step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_ELEMENTS = 2**23
_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Let this process train by itself: inside, :func:`processes` is 1, however many were launched together."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def is_alone() -> bool:
    """Whether this is inside :func:`alone`."""
    return _ALONE.get()


def processes() -> int:
    """Number of processes that work together; 1 without a process group, and inside :func:`alone`."""
    if _ALONE.get():
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """This process's index among :func:`processes`; 0 without a process group."""
    return dist.get_rank() if processes() > 1 else 0


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all processes.

    A parameter without a gradient counts as zero if any process has one, and keeps none if no process does: so
    all processes take the same update, and a parameter that nobody used gets no weight decay or momentum step.

    Args:
        parameters: The same parameters in the same order on every process.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if processes() == 1 or not trained:
        return
    used = torch.tensor([parameter.grad is not None for parameter in trained], device=trained[0].device).int()
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    chosen = [parameter for parameter, flag in zip(trained, used.tolist(), strict=True) if flag]
    for parameter in chosen:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    _average_([parameter.grad for parameter in chosen if parameter.grad is not None])


def average_buffers(buffers: Sequence[Tensor]) -> None:
    """Give all processes the same buffers: means of the real ones (running statistics), process 0's of the others.

    Args:
        buffers: The same buffers in the same order on every process.
    """
    if processes() == 1:
        return
    _average_([buffer for buffer in buffers if buffer.is_floating_point()])
    for buffer in buffers:
        if not buffer.is_floating_point():
            dist.broadcast(buffer, 0)


def broadcast_module(net: nn.Module) -> None:
    """Give all processes the parameters and buffers of process 0."""
    if processes() > 1:
        with torch.no_grad():
            for tensor in chain(net.parameters(), net.buffers()):
                _in_place(tensor, lambda flat: dist.broadcast(flat, 0))


def sum_over_processes(values: Tensor) -> Tensor:
    """Add up a tensor over all processes; the same tensor without a process group."""
    if processes() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def any_of(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Return, flag by flag, whether any process has set it; every process must call this.

    Args:
        flags: Equally many on every process.
        device: Where the network computes.

    >>> any_of([True, False], torch.device("cpu"))
    [True, False]
    """
    if processes() == 1:
        return list(flags)
    values = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def gather_objects(value: Any) -> list[Any]:
    """Return every process's plain value, in the order of the processes."""
    if processes() == 1:
        return [value]
    gathered: list[Any] = [None] * processes()
    dist.all_gather_object(gathered, value)
    return gathered


def wait_for_all() -> None:
    """Wait until every process is here."""
    if processes() > 1:
        dist.barrier()


@torch.no_grad()
def _average_(tensors: list[Tensor]) -> None:
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat)
        flat /= processes()
        for tensor, part in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors of one type into pieces large enough to make few calls, small enough to need little memory."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for same in kinds.values():
        bucket: list[Tensor] = []
        for tensor in same:
            if bucket and sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET_ELEMENTS:
                yield bucket
                bucket = []
            bucket.append(tensor)
        yield bucket


def _in_place(tensor: Tensor, change: Any) -> None:
    """Let a collective work on contiguous memory, which channels-last parameters do not have."""
    flat = tensor.detach().contiguous()
    change(flat)
    if flat.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat)
