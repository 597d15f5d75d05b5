"""Measure the kernels of a network that the cache does not know yet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from widthkit.latency.cache import Cache, Table
from widthkit.latency.conditions import Conditions
from widthkit.latency.fit import Curve, design
from widthkit.latency.kernels import IntArray, Kernel, Use
from widthkit.latency.replay import copy_seconds, kernel_seconds, quiet

Clock = Callable[[Kernel, Sequence[int], Conditions], float]
Say = Callable[[str], None]
_SAVE_SECONDS = 20
_COVERED = 0.95


def to_stderr(line: str) -> None:
    """Tell people what takes long."""
    print(line, file=sys.stderr)


def curves(
    uses: Sequence[Use],
    widest: IntArray,
    conditions: Conditions,
    cache: Cache,
    *,
    clock: Clock = kernel_seconds,
    copy_clock: Clock = copy_seconds,
    say: Say = to_stderr,
) -> dict[str, Curve]:
    """Return kernel key -> time as a function of the sizes; what the cache lacks is measured and kept there.

    Args:
        uses: The kernels of a network.
        widest: ``[groups]``: the widest network that is asked for.
        conditions: How to run.
        cache: What is known.
        clock: Times a kernel.
        copy_clock: Times a copy of its results, where the kernel cannot run alone.
        say: Told once when something has to be measured.
    """
    kernels = {use.kernel.key: use.kernel for use in uses}
    largest: dict[str, IntArray] = {}
    for use in uses:
        sizes = use.sizes(widest)
        largest[use.kernel.key] = np.maximum(largest.get(use.kernel.key, sizes), sizes)
    missing = {key: _missing(cache.table(key), largest[key]) for key in kernels}
    missing = {key: points for key, points in missing.items() if points}
    if missing:
        n_points = sum(map(len, missing.values()))
        say(f"latency: timing {len(missing)} operators at {n_points} sizes on {cache.device['device']}, once")
        quiet(conditions.device or "cpu")
    saved = time.monotonic()
    for key, points in missing.items():
        table, copied = _measured(kernels[key], points, conditions, clock, copy_clock)
        cache.add(key, kernels[key].label, table, copied)
        if time.monotonic() - saved > _SAVE_SECONDS:
            cache.save()
            saved = time.monotonic()
    if missing:
        cache.save()
    return {key: Curve.of(cache.table(key), kernel.contracts) for key, kernel in kernels.items()}


def _missing(table: Table, largest: IntArray) -> list[tuple[int, ...]]:
    """List the sizes to measure: none where a table reaches as far as this network needs."""
    reached = np.array(list(table), dtype=np.int64).reshape(len(table), len(largest)).max(axis=0, initial=0)
    if table and (reached >= _COVERED * largest).all():
        return []
    return [point for point in design(largest.tolist()) if point not in table]


def _measured(
    kernel: Kernel, points: Sequence[tuple[int, ...]], conditions: Conditions, clock: Clock, copy_clock: Clock
) -> tuple[Table, bool]:
    if kernel.copies:
        return {point: copy_clock(kernel, point, conditions) for point in points}, False
    try:
        return {point: clock(kernel, point, conditions) for point in points}, False
    except Exception:  # an argument that follows the widths in a way that its shapes do not tell
        return {point: copy_clock(kernel, point, conditions) for point in points}, True
