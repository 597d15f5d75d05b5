"""Measure the kernels of a network whose times are not in the cache yet."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from widthkit.errors import one_line
from widthkit.graph import IntArray
from widthkit.latency.cache import Cache, Table
from widthkit.latency.conditions import Conditions
from widthkit.latency.curves import Curve, sizes_to_measure
from widthkit.latency.kernels import Kernel, KernelUse
from widthkit.latency.measure import copy_seconds, keep_freed_memory, kernel_seconds

Clock = Callable[[Kernel, Sequence[int], Conditions], float]
Say = Callable[[str], None]
_SWEEPS = 3
"""How often all points are measured. Other work on a machine comes and goes within seconds, so sweeps differ."""
_COVERED = 0.95
"""A table that reaches this share of every needed size is not extended."""


def to_stderr(line: str) -> None:
    """Print a line about slow work."""
    print(line, file=sys.stderr)


@dataclass(frozen=True)
class Clocks:
    """Functions that time a kernel.

    Args:
        kernel: Times the kernel itself.
        copy: Times a copy of its results, for a kernel that cannot run alone.
        say: Is told when something is measured, and when a kernel cannot run alone.
    """

    kernel: Clock = kernel_seconds
    copy: Clock = copy_seconds
    say: Say = to_stderr


def measured_curves(
    uses: Sequence[KernelUse], widest: IntArray, conditions: Conditions, cache: Cache, clocks: Clocks
) -> dict[str, Curve]:
    """Return kernel key -> time as a function of the sizes; times that the cache lacks are measured and stored.

    Args:
        uses: The kernels of a network.
        widest: ``[groups]``: the largest width of every group that is asked for.
        conditions: How to run.
        cache: Earlier measurements.
        clocks: Functions that time a kernel.
    """
    kernels = {use.kernel.key: use.kernel for use in uses}
    largest: dict[str, IntArray] = {}
    for use in uses:
        sizes = use.sizes(widest)
        largest[use.kernel.key] = np.maximum(largest.get(use.kernel.key, sizes), sizes)
    if _all_missing(kernels, largest, cache):
        with cache.locked():
            missing = _all_missing(kernels, largest, cache)
            if missing:
                _measure(kernels, missing, conditions, cache, clocks)
    return {key: Curve.of(cache.table(key), kernel.contracts) for key, kernel in kernels.items()}


def _all_missing(
    kernels: Mapping[str, Kernel], largest: Mapping[str, IntArray], cache: Cache
) -> dict[str, list[tuple[int, ...]]]:
    found = {key: _missing(cache.table(key), largest[key]) for key in kernels}
    return {key: points for key, points in found.items() if points}


def _missing(table: Table, largest: IntArray) -> list[tuple[int, ...]]:
    """List the sizes to measure; none if the table reaches as far as this network needs."""
    reached = np.array(list(table), dtype=np.int64).reshape(len(table), len(largest)).max(axis=0, initial=0)
    if table and (reached >= _COVERED * largest).all():
        return []
    return [point for point in sizes_to_measure(largest.tolist()) if point not in table]


def _measure(
    kernels: Mapping[str, Kernel],
    missing: Mapping[str, list[tuple[int, ...]]],
    conditions: Conditions,
    cache: Cache,
    clocks: Clocks,
) -> None:
    """Measure all missing points in several sweeps and store the least time of each."""
    n_points = sum(map(len, missing.values()))
    clocks.say(f"latency: timing {len(missing)} operators at {n_points} sizes on {cache.device['device']}, once")
    keep_freed_memory(conditions.device or "cpu")
    copied: set[str] = set()
    tables: dict[str, Table] = {key: {} for key in missing}
    for _ in range(_SWEEPS):
        for key, points in missing.items():
            seconds = _sweep(kernels[key], points, copied, tables, conditions, clocks)
            tables[key] = {point: min(s, tables[key].get(point, s)) for point, s in seconds.items()}
    for key, table in tables.items():
        cache.add(key, table, key in copied)
    cache.save()


def _sweep(
    kernel: Kernel,
    points: Sequence[tuple[int, ...]],
    copied: set[str],
    tables: dict[str, Table],
    conditions: Conditions,
    clocks: Clocks,
) -> Table:
    """Time a kernel once at all points; if it cannot run alone, time copies of its results at all of them.

    A kernel cannot run alone if an argument follows the widths in a way that the shapes of its tensors do not show.
    """
    if not kernel.copies and kernel.key not in copied:
        try:
            return {point: clocks.kernel(kernel, point, conditions) for point in points}
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            clocks.say(f"latency: {kernel.label} cannot run alone ({one_line(error)}); a copy of its result is timed")
            copied.add(kernel.key)
            tables[kernel.key] = {}
    return {point: clocks.copy(kernel, point, conditions) for point in points}
