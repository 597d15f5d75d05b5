"""Read data sets from disk by name; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torchvision

from widthkit.errors import DataError, Option, close_matches
from widthkit.train.fashion import read_fashion
from widthkit.train.folders import read_folder
from widthkit.train.npz import read_npz
from widthkit.train.parts import Part, Source, checked_part, reason
from widthkit.train.split import stratified_order

_KINDS = ("digits", "fashion-mnist", "cifar10", "folder:DIR", "npz:FILE")


def read_source(name: str, data_dir: Path | None) -> Source:
    """Read the data set called ``name``.

    Raises:
        DataError: If the name is unknown, or the data are missing, damaged or of the wrong form.
    """
    kind, _, rest = name.partition(":")
    if kind in ("folder", "npz") and ":" in name:
        if not rest:
            raise DataError(f"data source '{name}' names no path; write {kind}:PATH.")
        return (read_folder if kind == "folder" else read_npz)(Path(rest).expanduser())
    readers: dict[str, Callable[[Path], Source]] = {"fashion-mnist": read_fashion, "cifar10": _read_cifar10}
    if name == "digits":
        return _read_digits()
    if name not in readers:
        raise DataError(f"unknown data source '{name}': {close_matches(name, _KINDS)}")
    if data_dir is None:
        raise DataError(
            f"{name} needs ", Option("data_dir"), ", the folder its files lie in; or use 'digits', which needs none."
        )
    if not data_dir.is_dir():
        raise DataError(
            f"{name}: there is no folder {data_dir}; pass ", Option("data_dir"), ", the folder of the data set's files."
        )
    return readers[name](data_dir)


def _read_digits() -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Grey levels 0..16; the factor makes them cover what eight bits hold.
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    everything = Part(images, digits.target.astype(np.int64))
    order = stratified_order(everything.labels, 0)
    tests = len(order) // 5
    names = tuple(str(name) for name in digits.target_names)
    return Source(everything.take(order[tests:]), None, everything.take(order[:tests]), names, flip=False)


def _read_cifar10(data_dir: Path) -> Source:
    try:
        train, test = (torchvision.datasets.CIFAR10(data_dir, train=flag, download=False) for flag in (True, False))
    except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise DataError(
            f"cifar10: no intact cifar-10-batches-py in {data_dir} ({reason(error)}); put torchvision's files there, "
            f"or use npz:FILE."
        ) from error
    parts = [checked_part(part.data, np.asarray(part.targets), f"cifar10 in {data_dir}") for part in (train, test)]
    return Source(parts[0], None, parts[1], tuple(train.classes))
