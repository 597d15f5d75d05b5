"""Fashion-MNIST in its official files, packed or not."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from widthkit.errors import DataError
from widthkit.train.parts import Source, checked_part, reason

_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def read_fashion(data_dir: Path) -> Source:
    """Read Fashion-MNIST from ``data_dir``, its ``raw`` or its ``FashionMNIST/raw``.

    Raises:
        DataError: If a file is missing or damaged.
    """
    choices = [data_dir / "FashionMNIST" / "raw", data_dir / "raw", data_dir]
    stems = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    folder = next((folder for folder in choices if _idx_file(folder, stems[0])), None)
    if folder is None:
        raise DataError(
            f"fashion-mnist: no {stems[0]}(.gz) in {data_dir} or its FashionMNIST/raw; put the files there."
        )
    arrays = [_read_idx(folder, stem) for stem in stems]
    where = f"fashion-mnist in {folder}"
    return Source(checked_part(arrays[0], arrays[1], where), None, checked_part(arrays[2], arrays[3], where), _FASHION)


def _idx_file(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def _read_idx(folder: Path, stem: str) -> NDArray[np.uint8]:
    """Read one array of unsigned bytes in the IDX format (torchvision would first write an unpacked copy)."""
    path = _idx_file(folder, stem)
    if path is None:
        raise DataError(f"fashion-mnist: {folder / stem}(.gz) is missing; put the official file there.")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({reason(error)}); fetch it again.") from error
    dims = data[3] if len(data) > 3 else 0
    start = 4 + 4 * dims
    shape = tuple(int(n) for n in np.frombuffer(data[4:start], dtype=">u4")) if len(data) >= start else ()
    if data[:3] != b"\0\0\x08" or len(shape) != dims or int(np.prod(shape, dtype=np.int64)) != len(data) - start:
        raise DataError(f"{path} is damaged (not the IDX file its header promises); fetch it again.")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)
