"""Files that wait in a temporary folder until all of them are complete."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from widthkit.errors import OptionError
from widthkit.files import atomic_json, replace_with


class StagedFiles:
    """Files of one network, written under a temporary folder and moved to their place together.

    Args:
        folder: The temporary folder.
        name: File name without an ending.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.base = folder / name
        self._records: dict[str, dict[str, Any]] = {}

    def file(self, suffix: str) -> Path:
        """Return the path of the staged file with the given ending."""
        return self.base.with_name(self.base.name + suffix)

    def record(self, file: Path, record: dict[str, Any]) -> None:
        """Keep the record of a staged file; it is written beside the file as ``FILE.json``."""
        self._records[file.name] = record

    def place(self, folder: Path) -> tuple[Path, ...]:
        """Move all files and records to ``folder``; if one cannot be written, new files are removed again.

        Returns:
            The paths of the files, recipes last; records are not among them.

        Raises:
            OptionError: If a file cannot be written.
        """
        order = sorted(self.base.parent.iterdir(), key=lambda f: (f.suffix == ".json", f.name))
        created: list[Path] = []
        try:
            for file in order:
                target = folder / file.name
                is_new = not target.exists()
                replace_with(target, lambda temporary, file=file: shutil.copyfile(file, temporary))  # type: ignore[misc]
                created += [target] if is_new else []
            for name, record in self._records.items():
                target = folder / f"{name}.json"
                is_new = not target.exists()
                atomic_json(target, record)
                created += [target] if is_new else []
        except (OSError, OptionError) as error:
            for target in created:
                with contextlib.suppress(OSError):  # the first error is the one to report
                    target.unlink()
            if isinstance(error, OptionError):
                raise
            raise OptionError(f"cannot write {folder}: {error.strerror or error}; choose another path") from error
        return tuple(folder / file.name for file in order)
