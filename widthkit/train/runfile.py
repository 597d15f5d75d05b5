"""The files of a training run in its folder: the last two checkpoints, and one line of figures per epoch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from widthkit.errors import CheckpointError, Option, OptionError
from widthkit.files import atomic_json_lines
from widthkit.train import parallel
from widthkit.train.checkpoint import load_tree, save_tree
from widthkit.train.settings import check_same_run

FILE_NAME, BEFORE_NAME, NEXT_NAME = (f"checkpoint{kind}.safetensors" for kind in ("", "-before", "-next"))
METRICS_NAME = "metrics.jsonl"
_PARTS = {"fingerprint", "done", "history", "processes", "state", "within"}


class RunFiles:
    """The files of one run; only process 0 writes them.

    Args:
        folder: The run's folder, which exists.
        fingerprint: What identifies the run.
        minutes: Time between two checkpoints.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], minutes: float) -> None:
        self.folder, self.fingerprint, self._seconds = folder, dict(fingerprint), 60 * minutes
        self._next = time.monotonic() + self._seconds
        # Whether checkpoint.safetensors is a good one of this run, so that the next one may push it back.
        self._current_is_good = False
        self._resumed = False

    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return time.monotonic() >= self._next

    def read(self) -> dict[str, Any] | None:
        """Read the last checkpoint that is not damaged; ``None`` if there is none yet. Every process must call this.

        Raises:
            CheckpointError: If all are damaged, or the checkpoint is of a run with other settings.
        """
        parallel.wait_for_all()  # Process 0 may still write.
        stored, used, remark = _read_last(self.folder)
        if stored is None:
            return None
        check_same_run(used, stored["fingerprint"], self.fingerprint)
        if remark and parallel.process_index() == 0:
            print(remark, file=sys.stderr, flush=True)
        self._current_is_good, self._resumed = used.name == FILE_NAME, True
        return stored

    def write(self, content: Mapping[str, Any]) -> None:
        """Write a checkpoint, and the figures of all epochs if it is that of a whole epoch.

        Raises:
            CheckpointError: If it cannot be written; the ones before are then still there.
            OptionError: If the figures cannot be written.
        """
        if parallel.process_index() == 0:
            if content["within"] is None:
                self.write_metrics(content["history"])
            self._replace({"fingerprint": self.fingerprint, **content})
        self._next = time.monotonic() + self._seconds

    def write_metrics(self, history: Sequence[Mapping[str, float]]) -> None:
        """Write one line of JSON per epoch.

        Raises:
            OptionError: If the file cannot be written.
        """
        if parallel.process_index() == 0:
            atomic_json_lines(self.folder / METRICS_NAME, history)

    def _replace(self, content: Mapping[str, Any]) -> None:
        current, before, new = (self.folder / name for name in (FILE_NAME, BEFORE_NAME, NEXT_NAME))
        save_tree(new, content)
        try:
            if self._current_is_good:
                os.replace(current, before)
            os.replace(new, current)
            if not self._resumed and not self._current_is_good:
                before.unlink(missing_ok=True)  # of another run, which this one replaces
        except OSError as error:
            raise CheckpointError(f"cannot write checkpoint {current}: {error.strerror or error}.") from error
        self._current_is_good = True


def prepare_out(out: str | Path) -> Path:
    """Make the run's folder and return it.

    Raises:
        OptionError: If the folder cannot be made or written to.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            f"cannot make the folder {out}: {error.strerror or error}; choose another ", Option("out")
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OptionError(f"cannot write into the folder {out}: permission denied; choose another ", Option("out"))
    return folder


def epochs_done(out: str | Path) -> int:
    """Return how many whole epochs of the run in a folder are done; 0 if there is no checkpoint.

    Raises:
        CheckpointError: If all checkpoints are damaged.
    """
    stored, _, _ = _read_last(Path(out))
    return 0 if stored is None else int(stored["done"])


def _read_last(folder: Path) -> tuple[dict[str, Any] | None, Path, str]:
    """Return the last checkpoint that is not damaged, its file, and a remark if it is not the newest one."""
    current, before = folder / FILE_NAME, folder / BEFORE_NAME
    found = [file for file in (current, before) if file.exists()]
    wrong: list[CheckpointError] = []
    for file in found:
        try:
            stored = _read(file)
        except CheckpointError as error:
            wrong.append(error)
        else:
            remark = f"{wrong[0]} Going on from {BEFORE_NAME}, the one before." if wrong else ""
            return stored, file, remark
    if len(wrong) > 1:
        raise CheckpointError(f"{wrong[0]} {BEFORE_NAME}, the one before, cannot be read either.") from wrong[1]
    if wrong:
        raise wrong[0]
    return None, current, ""


def _read(file: Path) -> dict[str, Any]:
    stored = load_tree(file)
    if not isinstance(stored, dict) or set(stored) != _PARTS:
        raise CheckpointError(f"{file} is not the checkpoint of a training run; choose another out folder.")
    return stored
