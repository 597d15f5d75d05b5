"""What several benchmarks need: the time of a call, one training step, a search on scores that are at hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from widthkit.search.searcher import Searcher
from widthkit.train.losses import cross_entropy
from widthkit.train.step import StepContext

T = TypeVar("T")


class Seconds(NamedTuple):
    """How long a call took: on the clock, and on all processors of this process."""

    clock: float
    processor: float


def timed(call: Callable[[], T], device: str = "cpu") -> tuple[T, Seconds]:
    """Return what a call returns, and its time; on CUDA its kernels are waited for."""
    clock, processor = time.perf_counter(), time.process_time()
    found = call()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return found, Seconds(time.perf_counter() - clock, time.process_time() - processor)


def step_context(images: Tensor, labels: Tensor, index: int = 0) -> StepContext:
    """Return a training step on one batch, with cross entropy, in full precision, without an optimizer.

    Args:
        images: ``[N, ...]``.
        labels: ``[N]``; classes.
        index: Number of the step; it seeds what the step draws.
    """
    generator = torch.Generator().manual_seed(index)
    return StepContext(images, labels, index, 0, cross_entropy(), Tensor.backward, generator, nullcontext)


def ask_and_tell(
    searcher: Searcher, score: Callable[[Mapping[str, int]], float], most: int | None = None
) -> dict[tuple[int, ...], float]:
    """Run a searcher on scores that are at hand, without a supernet.

    Args:
        searcher: Asked until it is done.
        score: The score of one width vector.
        most: End after this many different networks.

    Returns:
        The score of every network that was judged, by its widths in the order of the space.
    """
    judged: dict[tuple[int, ...], float] = {}
    while not searcher.done:
        asked = searcher.ask()
        keys = [tuple(widths[name] for name in searcher.space.names) for widths in asked]
        for key, widths in zip(keys, asked, strict=True):
            if key not in judged:
                if len(judged) == most:
                    return judged
                judged[key] = score(widths)
        if not asked:
            break
        searcher.tell(asked, [judged[key] for key in keys])
    return judged
