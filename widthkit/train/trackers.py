"""Tell experiment trackers such as TensorBoard about a run, through Accelerate's tracker classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from widthkit.errors import Option, OptionError, close_matches
from widthkit.train import parallel

_PROJECT = "widthkit"


def check_trackers(names: Sequence[str], out: str | Path | None) -> None:
    """Refuse trackers that could not be started.

    Args:
        names: Names of Accelerate's trackers.
        out: The run's folder.

    Raises:
        OptionError: If a name is unknown, its package is not installed, or it writes files and there is no folder.

    >>> check_trackers(["tensorbord"], "run")
    Traceback (most recent call last):
    widthkit.errors.OptionError: unknown tracker 'tensorbord': did you mean tensorboard?
    """
    if isinstance(names, str):
        raise OptionError(Option("trackers", names), " must be a list of names.")
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise OptionError(f"unknown tracker '{name}': {close_matches(name, LOGGER_TYPE_TO_CLASS)}")
        # A tracker that the user registered has no package to look for.
        if name in LoggerType.list() and name not in available:
            raise OptionError(f"the package of tracker '{name}' is not installed; run pip install {name}.")
        if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory and out is None:
            raise OptionError(f"tracker '{name}' writes into the run's folder; pass ", Option("out"), ".")


@contextmanager
def tracking(
    names: Sequence[str], out: str | Path | None, settings: Mapping[str, Any], cpu: bool
) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Start trackers and finish them at the end of the scope; process 0 does this for all.

    Args:
        names: Names that :func:`check_trackers` accepts.
        out: The run's folder.
        settings: The run's settings, which trackers show as its hyperparameters.
        cpu: Whether the run computes on the CPU.

    Yields:
        A function that takes an epoch's entry of the history.
    """
    started: list[Any] = []
    try:
        if names and parallel.process_index() == 0:
            # Trackers write log messages, which Accelerate does not allow without this.
            PartialState(cpu=cpu)
            for name in names:
                started.append(_start(LOGGER_TYPE_TO_CLASS[name], out, settings))

        def log(entry: Mapping[str, float]) -> None:
            figures = {name: value for name, value in entry.items() if name != "epoch"}
            for tracker in started:
                tracker.log(figures, step=int(entry["epoch"]))

        yield log
    finally:
        for tracker in started:
            tracker.finish()


def _start(kind: Any, out: str | Path | None, settings: Mapping[str, Any]) -> Any:
    tracker = kind(_PROJECT, str(out)) if kind.requires_logging_directory else kind(_PROJECT)
    # Only the process that starts it uses it.
    tracker.main_process_only = False
    tracker.start()
    plain = (str, float, int, bool)
    tracker.store_init_configuration(
        {name: value if isinstance(value, plain) else str(value) for name, value in settings.items()}
    )
    return tracker
