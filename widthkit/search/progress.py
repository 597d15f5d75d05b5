"""A progress bar for searches: best so far, networks per second, time left."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from widthkit.search.result import Trial

_SECONDS_PER_LINE = 15


class SearchBar:
    """A context manager that is called with every trial; one line now and then where stderr is no terminal."""

    def __init__(self) -> None:
        console = Console(file=sys.stderr)
        self._bar = Progress(
            TextColumn("search"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("search", total=1.0, text="")
        self._best = float("-inf")
        self._count = 0
        self._diverged = 0
        self._start = time.perf_counter()
        self._last_line = self._start

    def __enter__(self) -> SearchBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, trial: Trial, progress: float) -> None:
        """Show one more trial."""
        self._count += 1
        if math.isfinite(trial.score):
            self._best = max(self._best, trial.score)
        else:
            self._diverged += 1
        rate = self._count / max(time.perf_counter() - self._start, 1e-9)
        text = f"{self._count} networks, best score {self._best:.4f}, {rate:.1f}/s"
        if self._diverged:
            text += f", {self._diverged} without a finite loss"
        self._bar.update(self._task, completed=progress, text=text)
        if self._bar.disable and time.perf_counter() - self._last_line > _SECONDS_PER_LINE:
            self._last_line = time.perf_counter()
            left = (self._last_line - self._start) * (1 - progress) / max(progress, 1e-3)
            print(f"search {progress:.0%}: {text}, about {left:.0f} s left", file=sys.stderr)
