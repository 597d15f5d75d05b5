"""Judgements on disk, one line each, so that a killed search goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from widthkit.errors import CheckpointError, OptionError
from widthkit.search.evaluator import Judgement, Piece

VERSION = 1


class Journal:
    """A file of JSON lines: first whose search this is, then one judged width vector per line.

    Lines are only ever appended, so a search of n networks writes n lines, and a process killed while it writes
    loses at most the last one. Where a round's judgements are complete only at its end, a second file beside it holds
    their pieces until then.

    Args:
        path: Where to keep them; ``None`` keeps nothing.
        identity: Hash of the search; a journal of another search is refused.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "journal.jsonl"
    >>> Journal(path, "a1").add("widths", Judgement(-0.5, 0.5, None))
    >>> Journal(path, "a1").read()
    {'widths': Judgement(score=-0.5, loss=0.5, accuracy=None)}
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path = path
        self.identity = identity
        self._whole = 0  # bytes of whole lines; what comes after them was torn and is overwritten
        self._pieces = None if path is None else path.with_name(path.stem + "-pieces.jsonl")
        self._whole_pieces = 0

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
        line = {"widths": key, "score": judgement.score, "loss": judgement.loss, "accuracy": judgement.accuracy}
        self._whole = self._append(self.path, self._whole, line)

    def read_pieces(self) -> list[Piece]:
        """Return what an interrupted round of the same search knew of networks whose judgement had to wait.

        What cannot be read is left out: it only has to be computed again.
        """
        if self._pieces is None or not self._pieces.exists():
            return []
        try:
            data = self._pieces.read_bytes()
            whole = data.rfind(b"\n") + 1
            header, *lines = [json.loads(line) for line in data[:whole].decode("utf-8").splitlines()] or [{}]
            if header.get("identity") != self.identity:
                return []
            found = [_piece(line) for line in lines]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return []
        self._whole_pieces = whole
        return found

    def add_piece(self, piece: Piece) -> None:
        """Write down a part of a judgement that must wait for the rest.

        Raises:
            OptionError: If the file cannot be written.
        """
        if self._pieces is not None:
            self._whole_pieces = self._append(self._pieces, self._whole_pieces, asdict(piece))

    def end_round(self) -> None:
        """Forget the pieces: all judgements of the round are written."""
        if self._pieces is not None and self._whole_pieces:
            self._whole_pieces = 0
            self._pieces.unlink(missing_ok=True)

    def _append(self, path: Path, whole: int, line: Mapping[str, Any]) -> int:
        """Write a line behind the first ``whole`` bytes, and a header before the first line; return the new length."""
        lines = [line] if whole else [{"version": VERSION, "identity": self.identity}, line]
        data = "".join(json.dumps(entry) + "\n" for entry in lines).encode("utf-8")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("r+b" if whole else "wb") as file:
                file.seek(whole)
                file.truncate()
                file.write(data)
        except OSError as error:
            raise OptionError(f"cannot write {path}: {error.strerror or error}") from error
        return whole + len(data)


def _piece(line: Mapping[str, Any]) -> Piece:
    accuracy = line["accuracy"]
    return Piece(
        tuple((str(name), int(width)) for name, width in line["widths"]),
        int(line["path"]),
        int(line["batch"]),
        float(line["loss"]),
        None if accuracy is None else float(accuracy),
    )


def _entry(line: Mapping[str, Any]) -> tuple[str, Judgement]:
    accuracy = line["accuracy"]
    judgement = Judgement(float(line["score"]), float(line["loss"]), None if accuracy is None else float(accuracy))
    return str(line["widths"]), judgement
