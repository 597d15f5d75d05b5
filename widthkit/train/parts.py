"""The form in which all data sets are read, and the checks of their arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from widthkit.errors import DataError

Images: TypeAlias = NDArray[np.uint8]
Labels: TypeAlias = NDArray[np.int64]

_MOST_CLASSES = 1_000_000


@dataclass(frozen=True)
class Part:
    """Images with labels: either an array ``(N, H, W, C)`` or N file paths."""

    images: Images | tuple[str, ...]
    labels: Labels

    def take(self, order: Any) -> Part:
        """Return the samples at these indices, in this order."""
        if isinstance(self.images, tuple):
            return Part(tuple(self.images[index] for index in order), self.labels[order])
        return Part(self.images[order], self.labels[order])


@dataclass(frozen=True)
class Source:
    """A data set as stored; splits that it does not come with are ``None``."""

    train: Part
    valid: Part | None
    test: Part | None
    class_names: tuple[str, ...]
    flip: bool = True


def checked_part(images: NDArray[Any], labels: NDArray[Any], where: str) -> Part:
    """Check arrays and bring them into form.

    Args:
        images: ``(N, H, W)`` or ``(N, H, W, C)``, uint8.
        labels: ``(N,)`` or ``(N, 1)``, whole numbers from 0.
        where: Where the arrays come from, for the message.

    Raises:
        DataError: If they are something else, or differ in length.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
        raise DataError(
            f"{where}: images must be uint8 (N, H, W) or (N, H, W, C) and not empty, they are {images.dtype} "
            f"{images.shape}; convert them."
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{where}: labels must be whole numbers (N,), they are {labels.dtype} {labels.shape}.")
    if len(labels) != len(images):
        raise DataError(f"{where}: {len(images)} images but {len(labels)} labels; give each image one label.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= _MOST_CLASSES:
        raise DataError(f"{where}: labels go from {low} to {high}; number the classes from 0.")
    return Part(images if images.ndim == 4 else images[..., None], labels.astype(np.int64))


def reason(error: Exception) -> str:
    """Say in one short line why a library or the system failed."""
    system = error.strerror if isinstance(error, OSError) else None
    text = " ".join((system or str(error)).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."
