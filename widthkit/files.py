"""Write files completely or not at all: readers never see half a file, and a failure leaves the old file in place."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

from widthkit.errors import OptionError


def atomic_write(path: Path, data: bytes) -> None:
    """Replace the file at ``path`` by ``data``, all of it or nothing.

    Missing parent folders are created. The bytes are written to a temporary file in the same folder and synced to the
    disk; then the file is renamed to ``path``.

    Args:
        path: The file to write.
        data: The whole contents.

    Raises:
        OptionError: If the file cannot be written; names the path and the system's reason.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "deep" / "note.txt"
    >>> atomic_write(target, b"all of it")
    >>> target.read_bytes()
    b'all of it'
    """
    target = Path(path)
    try:
        replace_with(target, lambda temporary: _write_bytes(temporary, data))
    except OSError as error:
        reason = error.strerror or str(error)
        raise OptionError(f"cannot write {target}: {reason}. Choose another path or free some space.") from error


def atomic_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON with a newline at the end, all of it or nothing.

    The order of dicts is kept, so equal values give equal bytes. NaN and infinity become null, because JSON lacks them.

    Args:
        path: The file to write.
        value: Anything ``json.dumps`` takes; paths are written as text.

    Raises:
        OptionError: If the value has no JSON form, or the file cannot be written.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.json"
    >>> atomic_json(target, {"loss": float("nan"), "widths": [8, 16]})
    >>> json.loads(target.read_text())
    {'loss': None, 'widths': [8, 16]}
    """
    try:
        text = json.dumps(_without_nan(value), indent=2, ensure_ascii=False, allow_nan=False, default=_json_form)
    except (TypeError, ValueError) as error:
        raise OptionError(f"cannot write {path}: {error}. Pass numbers, text, lists and dicts only.") from error
    atomic_write(Path(path), (text + "\n").encode("utf-8"))


def atomic_json_lines(path: Path, values: Iterable[object]) -> None:
    """Write one line of JSON per value, all of them or nothing; NaN and infinity become null.

    Args:
        path: The file to write.
        values: Plain values.

    Raises:
        OptionError: If the file cannot be written.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.jsonl"
    >>> atomic_json_lines(target, [{"epoch": 1}, {"epoch": 2, "accuracy": float("nan")}])
    >>> target.read_text().splitlines()
    ['{"epoch": 1}', '{"epoch": 2, "accuracy": null}']
    """
    lines = [json.dumps(_without_nan(value), ensure_ascii=False, allow_nan=False) + "\n" for value in values]
    atomic_write(Path(path), "".join(lines).encode("utf-8"))


def replace_with(target: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file, sync it, and rename it to ``target``; remove it on any failure.

    Args:
        target: The file to replace.
        write: Called with the path of the temporary file, which is in the target's folder.

    Raises:
        OSError: If the system refuses; ``target`` is then unchanged.
    """
    # If the target is a link, replace the file it points to, as an ordinary write would.
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are private to the user; these get the mode of the user's umask.
    temporary = target.with_name(f".{target.name[:80]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    # The rename must survive a power cut too. Some systems cannot sync a folder; the file itself is safe then.
    with contextlib.suppress(OSError):
        _sync(target.parent)


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _without_nan(value: object) -> object:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value


def _json_form(value: object) -> object:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
