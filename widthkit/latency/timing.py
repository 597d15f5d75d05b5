"""Time several networks in turns, so that a busy moment of the machine affects all of them."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn


def interleaved(
    calls: Mapping[str, Callable[[], object]], *, repeats: int = 15, warmup: int = 3, device: str = "cpu"
) -> dict[str, list[float]]:
    """Time several calls in turns, so that a busy moment of the machine affects all of them.

    Args:
        calls: Name -> function to time.
        repeats: Timed rounds.
        warmup: Rounds before them that are not counted.
        device: On CUDA, every call is timed between two events and waited for.

    Returns:
        Name -> seconds of every timed round.
    """
    cuda = torch.device(device).type == "cuda"
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for round_ in range(warmup + repeats):
        # The order rotates, so that no call always runs after an idle gap or after a large network.
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            seconds = _on_cuda(calls[name], device) if cuda else _on_cpu(calls[name])
            if round_ >= warmup:
                times[name].append(seconds)
    return times


def _on_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _on_cuda(call: Callable[[], object], device: str) -> float:
    """Time one call between two events on the device's own clock, and wait for its end."""
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def forward_latency(
    models: Mapping[str, nn.Module], shape: tuple[int, ...], *, device: str = "cpu"
) -> dict[str, float]:
    """Return the median milliseconds of one forward pass of each model, in eval mode, measured in turns.

    Args:
        models: Name -> model; the models are moved to the device.
        shape: Input shape, batch included.
        device: Where to measure.
    """
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    ready = {name: model.eval().to(device) for name, model in models.items()}

    def call(model: nn.Module) -> Callable[[], object]:
        return lambda: model(example)

    with torch.inference_mode():
        times = interleaved({n: call(m) for n, m in ready.items()}, device=device)
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def keep_pages() -> bool:
    """Let glibc keep freed memory for the rest of the process; return whether that worked.

    By default glibc returns large blocks to the system and gets them back zeroed, page by page. These page faults cost
    up to a tenth of a training step on a CPU and vary from step to step, which hides differences between networks.
    """
    if not sys.platform.startswith("linux"):
        return False
    trim_threshold, top_pad, mmap_max, most = -1, -2, -4, 2**31 - 1
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library has no mallopt
        return False
    return all(mallopt(name, value) for name, value in ((mmap_max, 0), (trim_threshold, most), (top_pad, 2**28)))
