"""Judgements on disk, one line each, so that a killed search goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from widthkit.errors import CheckpointError, OptionError
from widthkit.search.judging import Judgement

VERSION = 1


class Journal:
    """A file of JSON lines: a header with the search's identity, then one judgement per line.

    Lines are only ever appended, so a search of n networks writes n lines, and a process that is killed while it writes
    loses at most the last one.

    Args:
        path: Where to keep them; ``None`` keeps nothing.
        identity: Hash of the search; a journal of another search is refused.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "journal.jsonl"
    >>> Journal(path, "a1").add("widths", Judgement(-0.5, 0.5, None))
    >>> Journal(path, "a1").read()
    {'widths': Judgement(score=-0.5, loss=0.5, accuracy=None, path=0)}
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path = path
        self.identity = identity
        self._whole = 0  # bytes of whole lines; a torn line after them is overwritten

    def read(self) -> dict[str, Judgement]:
        """Return the judgements of an earlier run of the same search; nothing if there was none.

        Raises:
            CheckpointError: If the journal is damaged or belongs to another search.
        """
        if self.path is None or not self.path.exists():
            return {}
        try:
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            lines = [json.loads(line) for line in data[:whole].decode("utf-8").splitlines()]
            header, found = lines[:1], dict(_entry(line) for line in lines[1:])
            identity = header[0]["identity"] if header else self.identity
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path} is damaged ({error}); delete it to search from the start") from error
        if identity != self.identity:
            raise CheckpointError(
                f"{self.path} belongs to another search (other weights, data, space, budget, searcher or seed); "
                "delete it or choose another folder"
            )
        self._whole = whole
        return found

    def add(self, key: str, judgement: Judgement) -> None:
        """Write one more judgement down.

        Raises:
            OptionError: If the file cannot be written.
        """
        if self.path is None:
            return
        self._append(self.path, {"widths": key, **asdict(judgement)})

    def _append(self, path: Path, line: Mapping[str, Any]) -> None:
        """Append a line after the last complete one; write the header first if the file is empty."""
        lines = [line] if self._whole else [{"version": VERSION, "identity": self.identity}, line]
        data = "".join(json.dumps(entry) + "\n" for entry in lines).encode("utf-8")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("r+b" if self._whole else "wb") as file:
                file.seek(self._whole)
                file.truncate()
                file.write(data)
        except OSError as error:
            raise OptionError(f"cannot write {path}: {error.strerror or error}") from error
        self._whole += len(data)


def _entry(line: Mapping[str, Any]) -> tuple[str, Judgement]:
    accuracy = line["accuracy"]
    accuracy = None if accuracy is None else float(accuracy)
    # Journals of earlier versions name no path; those versions always took the first one.
    judgement = Judgement(float(line["score"]), float(line["loss"]), accuracy, int(line.get("path", 0)))
    return str(line["widths"]), judgement
