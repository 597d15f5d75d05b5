"""Data sets as folders of image files, one folder per class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torchvision

from widthkit.errors import DataError
from widthkit.train.parts import Part, Source, reason


def read_folder(path: Path) -> Source:
    """Read class folders in ``path/train`` and ``path/val`` or ``path/test``, or in ``path`` itself.

    Raises:
        DataError: If there are none, or if the parts have different classes.
    """
    if not path.is_dir():
        raise DataError(f"there is no folder {path}; check the path after folder:")
    held_out = [path / name for name in ("val", "valid", "validation") if (path / name).is_dir()]
    test = path / "test" if (path / "test").is_dir() else None
    if not (path / "train").is_dir():
        train, names = _read_classes(path)
        return Source(train, None, None, names)
    train, names = _read_classes(path / "train")
    # A single held-out folder is the test split; the validation split then comes out of the training images.
    valid = _read_split(held_out[0], names) if held_out and test else None
    tested = test or (held_out[0] if held_out else None)
    return Source(train, valid, _read_split(tested, names) if tested else None, names)


def _read_split(path: Path, names: tuple[str, ...]) -> Part:
    part, found = _read_classes(path)
    if not set(found) <= set(names):
        extra = ", ".join(sorted(set(found) - set(names))[:5])
        raise DataError(f"{path} has classes that the training folder lacks: {extra}; use the same class folders.")
    return Part(part.images, np.array([names.index(found[label]) for label in part.labels], dtype=np.int64))


def _read_classes(path: Path) -> tuple[Part, tuple[str, ...]]:
    try:
        listing = torchvision.datasets.ImageFolder(path)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{path} has no class folders with images in each ({reason(error)}); lay it out as class/image.jpg."
        ) from error
    files = tuple(file for file, _ in listing.samples)
    return Part(files, np.array(listing.targets, dtype=np.int64)), tuple(listing.classes)
