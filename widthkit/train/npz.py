"""Data sets in one npz file."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from widthkit.errors import DataError
from widthkit.train.parts import Part, Source, checked_part, reason


def read_npz(path: Path) -> Source:
    """Read a file with arrays ``train_images``, ``train_labels``, ..., or ``x_train``, ..., or ``images``, ``labels``.

    Raises:
        DataError: If the file or an array is missing, damaged or of the wrong form.
    """
    arrays = _load_npz(path)
    forms = [("{}_images", "{}_labels"), ("x_{}", "y_{}"), ("images", "labels")]
    form = next((form for form in forms if form[0].format("train") in arrays), None)
    if form is None:
        found = ", ".join(sorted(arrays)[:8]) or "nothing"
        raise DataError(
            f"{path} holds {found}; it needs train_images and train_labels, x_train and y_train, or images."
        )
    train = _npz_part(path, arrays, form, ("train",))
    # A single pair of arrays has no named splits.
    split = form[0] != "images"
    valid = _npz_part(path, arrays, form, ("val", "valid", "validation")) if split else None
    test = _npz_part(path, arrays, form, ("test",)) if split else None
    assert train is not None
    parts = [part for part in (train, valid, test) if part is not None]
    return Source(train, valid, test, _class_names(path, arrays, parts))


def _load_npz(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise DataError(f"there is no file {path}; check the path after npz:")
    try:
        # Object arrays are pickles, which run code when loaded.
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise DataError(
            f"{path} is not a readable npz file ({reason(error)}); write it again with numpy.savez."
        ) from error


def _npz_part(
    path: Path, arrays: Mapping[str, NDArray[Any]], form: tuple[str, str], names: tuple[str, ...]
) -> Part | None:
    keys = next(((form[0].format(n), form[1].format(n)) for n in names if form[0].format(n) in arrays), None)
    if keys is None:
        return None
    if keys[1] not in arrays:
        raise DataError(f"{path} has {keys[0]} but no {keys[1]}; add the labels.")
    return checked_part(arrays[keys[0]], arrays[keys[1]], f"{path} ({keys[0]})")


def _class_names(path: Path, arrays: Mapping[str, NDArray[Any]], parts: list[Part]) -> tuple[str, ...]:
    classes = 1 + max(int(part.labels.max()) for part in parts)
    names = arrays.get("class_names")
    if names is None:
        return tuple(str(index) for index in range(classes))
    if names.ndim != 1 or len(names) < classes:
        raise DataError(f"{path}: class_names must be {classes} names in a row; leave it out or correct it.")
    return tuple(str(name) for name in names)
