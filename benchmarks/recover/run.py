"""Make the rows, several at a time, each in a process of its own, and the table of all that are there."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.recover.row import Task, make_row
from benchmarks.recover.setup import Setup
from benchmarks.recover.ways import ways
from widthkit.errors import OptionError, close_matches

Say = Callable[[str], None]


def tasks(names: Sequence[str], speedups: Sequence[float], seeds: int) -> Iterator[Task]:
    """Yield the rows to make, all ways with the first seed before the next seed.

    Raises:
        OptionError: If a way is unknown.
    """
    known = ways()
    for name in names:
        if name not in known:
            raise OptionError(f"unknown way '{name}': {close_matches(name, known)}")
    for speedup, seed, name in itertools.product(speedups, range(seeds), names):
        yield Task(name, speedup, seed)


def run(wanted: Sequence[Task], arguments: Sequence[str], jobs: int, say: Say) -> None:
    """Make rows in processes of their own; one that fails is reported and left out.

    Args:
        wanted: The rows.
        arguments: Command-line arguments that describe the setup.
        jobs: How many processes at a time; each has one thread.
        say: Called with one line per row.
    """

    def make(task: Task) -> None:
        command = [sys.executable, "-m", "benchmarks", "recover-row", task.way, f"{task.speedup}", f"{task.seed}"]
        done = subprocess.run([*command, *arguments], check=False, capture_output=True, text=True)
        last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
        say(f"{task.name}: {last[0] if last else f'exit code {done.returncode}'}")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(make, wanted))


def one(setup: Setup, task: Task, folder: Path) -> str:
    """Make one row in this process and say what it found."""
    torch.set_num_threads(1)
    row = make_row(setup, task, ways()[task.way], folder / task.name)
    return (
        f"{row['test']:.2%} on the test images after {row['final_epochs']} epochs, {row['macs'] / 1e6:.1f}M MACs, "
        f"cost {row['cost_total']:.2f}, {row['seconds'] / 60:.0f} min"
    )


def rows(folder: Path) -> list[dict[str, object]]:
    """Read all rows that are there."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*/row.json"))]
