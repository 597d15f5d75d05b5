"""Measure the kernels of a network that the cache does not know yet."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from widthkit.latency.cache import Cache, Table
from widthkit.latency.conditions import Conditions
from widthkit.latency.fit import Curve, design
from widthkit.latency.kernels import IntArray, Kernel, Use
from widthkit.latency.replay import copy_seconds, kernel_seconds, quiet

Clock = Callable[[Kernel, Sequence[int], Conditions], float]
Say = Callable[[str], None]
_SWEEPS = 3
"""How often all points are gone through: what else runs on a machine comes and goes within seconds."""
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
    if _all_missing(kernels, largest, cache):
        with cache.locked():
            missing = _all_missing(kernels, largest, cache)
            if missing:
                _measure(kernels, missing, conditions, cache, clock, copy_clock, say)
    return {key: Curve.of(cache.table(key), kernel.contracts) for key, kernel in kernels.items()}


def _all_missing(
    kernels: Mapping[str, Kernel], largest: Mapping[str, IntArray], cache: Cache
) -> dict[str, list[tuple[int, ...]]]:
    found = {key: _missing(cache.table(key), largest[key]) for key in kernels}
    return {key: points for key, points in found.items() if points}


def _measure(
    kernels: Mapping[str, Kernel],
    missing: Mapping[str, list[tuple[int, ...]]],
    conditions: Conditions,
    cache: Cache,
    clock: Clock,
    copy_clock: Clock,
    say: Say,
) -> None:
    """Go through all missing points several times and keep the least times."""
    n_points = sum(map(len, missing.values()))
    say(f"latency: timing {len(missing)} operators at {n_points} sizes on {cache.device['device']}, once")
    quiet(conditions.device or "cpu")
    copied: set[str] = set()
    found: dict[str, Table] = {}
    for _ in range(_SWEEPS):
        for key, points in missing.items():
            _sweep(kernels[key], points, found.setdefault(key, {}), copied, conditions, clock, copy_clock)
    for key, table in found.items():
        cache.add(key, kernels[key].label, table, key in copied)
    cache.save()


def _missing(table: Table, largest: IntArray) -> list[tuple[int, ...]]:
    """List the sizes to measure: none where a table reaches as far as this network needs."""
    reached = np.array(list(table), dtype=np.int64).reshape(len(table), len(largest)).max(axis=0, initial=0)
    if table and (reached >= _COVERED * largest).all():
        return []
    return [point for point in design(largest.tolist()) if point not in table]


def _sweep(
    kernel: Kernel,
    points: Sequence[tuple[int, ...]],
    table: Table,
    copied: set[str],
    conditions: Conditions,
    clock: Clock,
    copy_clock: Clock,
) -> None:
    """Time a kernel at all points once; the least of all sweeps stays in the table."""
    for point in points:
        seconds = None
        if not kernel.copies and kernel.key not in copied:
            try:
                seconds = clock(kernel, point, conditions)
            except Exception:  # an argument that follows the widths in a way that its shapes do not tell
                copied.add(kernel.key)
                table.clear()
                return _sweep(kernel, points, table, copied, conditions, clock, copy_clock)
        if seconds is None:
            seconds = copy_clock(kernel, point, conditions)
        table[point] = min(seconds, table.get(point, seconds))
    return None
