"""Measure the peak memory of a call."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """Return the most bytes of tensors that a call held at once, without those that existed before it.

    On a CPU the profiler records every allocation and release of torch's allocator; on CUDA the peak of the caching
    allocator is read.

    Args:
        call: What to measure.
        device: Where the call runs.

    >>> peak_bytes(lambda: torch.ones(1000) + torch.ones(1000)) >= 3 * 4000
    True
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Without this, the profiler's library logs to standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    held, peak = 0, 0
    for _, _, nbytes in changes:
        held += nbytes
        peak = max(peak, held)
    return peak
