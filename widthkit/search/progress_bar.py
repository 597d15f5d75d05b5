"""A progress bar for searches: best so far, networks per second, time left."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from widthkit.search.result import Trial

_SECONDS_PER_LINE = 15
_INSTANT = 1e-3
"""No network is judged in so few seconds: the judgement was in the journal."""


class SearchBar:
    """A context manager that is called with every trial; one line now and then where stderr is no terminal."""

    def __init__(self) -> None:
        console = Console(file=sys.stderr)
        self._bar = Progress(
            TextColumn("search"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("search", total=1.0, text="")
        self._best = float("-inf")
        self._count = 0
        self._diverged = 0
        self._timed, self._seconds, self._gained = 0, 0.0, 0.0
        self._progress = 0.0
        self._now = self._start = time.perf_counter()
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
        self._time(progress)
        rate = self._count / max(self._now - self._start, 1e-9)
        text = f"{self._count} networks, best score {self._best:.4f}, {rate:.1f}/s"
        if self._diverged:
            text += f", {self._diverged} without a finite loss"
        if (left := self.seconds_left) is not None:
            text += f", about {left:.0f} s left"
        self._bar.update(self._task, completed=progress, text=text)
        if self._bar.disable and self._now - self._last_line > _SECONDS_PER_LINE:
            self._last_line = self._now
            print(f"search {progress:.0%}: {text}", file=sys.stderr)

    def _time(self, progress: float) -> None:
        """Note how long the progress since the last network took; what the journal knew took no time."""
        before, self._now = self._now, time.perf_counter()
        # What the first network took includes getting ready.
        if self._count > 1 and self._now - before > _INSTANT:
            self._timed += 1
            self._seconds += self._now - before
            self._gained += max(0.0, progress - self._progress)
        self._progress = progress

    @property
    def seconds_left(self) -> float | None:
        """How long the rest takes at the pace so far; ``None`` before two networks were timed."""
        if self._timed < 2 or not self._gained or self._progress >= 1:
            return None
        return self._seconds / self._gained * (1 - self._progress)
