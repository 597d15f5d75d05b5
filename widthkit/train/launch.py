"""Join the processes that were launched together, and find the device of each."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from widthkit.errors import Option, OptionError
from widthkit.train import parallel

_NOT_SUPPORTED = {"DEEPSPEED": "DeepSpeed", "FSDP": "FSDP", "MEGATRON_LM": "Megatron-LM"}
"""What ``accelerate launch`` announces as ``ACCELERATE_USE_...=true``, beside plain data parallelism."""


def launched() -> bool:
    """Whether ``torchrun`` or ``accelerate launch`` started several processes, or a process group exists already."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() > 1
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(device: torch.device | None = None) -> torch.device:
    """Join the processes that were launched together, if any, and return the device that this process uses.

    A process group that exists already is used as it is. One that is made here stays until the program ends.

    Args:
        device: The device that the user named, which this machine has. By default it is the process's own accelerator
            if there is one, else the CPU.

    Raises:
        OptionError: If the device does not fit the launch, or if the processes cannot be joined.

    >>> join(torch.device("cpu"))
    device(type='cpu')
    """
    if not launched():
        return device or torch.device(_own_kind())
    own = _own_device(device)
    if not parallel.is_alone():
        _join_group(own)
    if device is None or device.type == own.type:
        # The launch settled which card is whose.
        return own
    if not parallel.is_alone():
        raise OptionError(
            Option("device", str(device)), f" does not fit processes launched for {own.type}; leave it out."
        )
    return device


def _own_kind() -> str:
    if _is_set("ACCELERATE_USE_CPU"):
        return "cpu"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def _own_device(device: torch.device | None) -> torch.device:
    kind = "cpu" if device is not None and device.type == "cpu" else _own_kind()
    if kind == "cpu":
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", torch.accelerator.current_device_index()))
    if index >= torch.accelerator.device_count():
        raise OptionError(
            f"process {index} of this machine has no {kind} device of its own, there are "
            f"{torch.accelerator.device_count()}; launch fewer processes, or pass ",
            Option("device", "cpu"),
            ".",
        )
    # Collectives use the current device.
    torch.accelerator.set_device_index(index)
    return torch.device(kind, index)


def _join_group(own: torch.device) -> None:
    for name, title in _NOT_SUPPORTED.items():
        if _is_set(f"ACCELERATE_USE_{name}"):
            raise OptionError(f"widthkit trains with data parallelism on CPUs or GPUs, not with {title}; use torchrun.")
    if dist.is_initialized():
        return
    # Plain objects go through the CPU's backend.
    backend = "gloo" if own.type == "cpu" else f"cpu:gloo,{own.type}:{dist.get_default_backend_for_device(own)}"
    try:
        dist.init_process_group(backend)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise OptionError(f"the launched processes cannot be joined: {reason}. Start them with torchrun.") from error


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")
