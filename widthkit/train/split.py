"""Splits that keep the classes in proportion."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def stratified_order(labels: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Shuffle a data set so that every stretch of the order has all classes in proportion.

    The first k indices are a stratified sample of k, and the others a stratified rest.

    Args:
        labels: ``(N,)``.
        seed: Makes the order; the same seed gives the same order.

    Returns:
        A permutation of ``0..N-1``.

    >>> labels = np.array([0] * 80 + [1] * 20)
    >>> order = stratified_order(labels, seed=0)
    >>> np.bincount(labels[order[:50]]).tolist(), sorted(order.tolist()) == list(range(100))
    ([40, 10], True)
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    classes = labels[shuffled]
    by_class = np.argsort(classes, kind="stable")
    counts = np.bincount(classes, minlength=1)
    starts = np.cumsum(counts) - counts
    rank = np.empty(len(labels), dtype=np.int64)
    rank[by_class] = np.arange(len(labels)) - np.repeat(starts, counts)
    # The i-th of a class's n samples belongs at the share (i + 1/2) / n of the way.
    place = (rank + 0.5) / counts[classes]
    order: NDArray[np.int64] = shuffled[np.argsort(place, kind="stable")]
    return order
