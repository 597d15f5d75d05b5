"""The Accelerate engine, and the few collectives that let several processes train one network exactly.

The network is not wrapped in ``DistributedDataParallel``: a supernet's step runs several sub-networks forwards and
backwards, which use different parameters on different processes. Averaging the finished gradients is exact for any
such step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch import Tensor, nn

from widthkit.errors import Option, OptionError

_BUCKET_ELEMENTS = 2**23
_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work by itself: widthkit's functions see one process, however many were launched together."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


@contextmanager
def accelerator_scope(mixed_precision: str, device: torch.device | None) -> Iterator[Any]:
    """Make an ``Accelerator`` for one run.

    Accelerate keeps one precision and one device per Python process and refuses others later. A run must not depend
    on the runs before it, nor spoil an ``Accelerator`` that the user has, so its shared states are put back.

    Args:
        mixed_precision: ``no``, ``fp16`` or ``bf16``.
        device: Where to train; Accelerate's choice when ``None``.

    Raises:
        OptionError: If this machine, or the way the processes were launched, does not allow it.
    """
    shared = [PartialState._shared_state, AcceleratorState._shared_state, GradientState._shared_state]
    saved = [dict(state) for state in shared]
    try:
        # The first state owns the process group, which stays.
        shared[1].clear()
        shared[2].clear()
        yield _make_accelerator(mixed_precision, device)
    finally:
        for state, before in zip(shared, saved, strict=True):
            state.clear()
            state.update(before)


def _make_accelerator(mixed_precision: str, device: torch.device | None) -> Any:
    state = PartialState(cpu=device is not None and device.type == "cpu")
    if device is not None:
        other = device.type != state.device.type
        if state.num_processes > 1 and other and not _ALONE.get():
            raise OptionError(
                Option("device", str(device)), f" does not fit processes launched for {state.device.type}; drop it."
            )
        # Within a group, which card is ours was settled at launch.
        state.device = device if state.num_processes == 1 or other else state.device
    if _ALONE.get():
        state.num_processes, state.process_index, state.local_process_index = 1, 0, 0
        state.distributed_type = DistributedType.NO
    if mixed_precision == "fp16" and state.device.type == "cpu":
        # Accelerate would silently train in full precision.
        raise OptionError(Option("mixed_precision", "fp16"), " cannot be used on a CPU; take 'no' or 'bf16'.")
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dataloader_config=DataLoaderConfiguration(even_batches=True, split_batches=False),
        )
    except (ValueError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise OptionError(
            Option("mixed_precision", mixed_precision), f" cannot be used: {reason}. Try 'no' or 'bf16'."
        ) from error
    kind = str(accelerator.distributed_type).rsplit(".", 1)[-1]
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise OptionError(f"widthkit trains on CPUs or GPUs with data parallelism, not with {kind}; use torchrun.")
    return accelerator


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


def average_buffers(net: nn.Module) -> None:
    """Give all processes the same buffers: means of the real ones (running statistics), process 0's of the others."""
    if processes() == 1:
        return
    buffers = list(net.buffers())
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
