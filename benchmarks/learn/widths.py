"""Choose the width vectors to compare: some differ in MACs, some in shape alone."""

from __future__ import annotations

import numpy as np

from widthkit.errors import OptionError
from widthkit.graph import FloatArray, IntArray
from widthkit.graph.space import SearchSpace

_DRAWS = 50_000


def choose_widths(
    space: SearchSpace, n: int, *, share: float = 0.4, spread: float = 0.015, seed: int = 0
) -> tuple[list[dict[str, int]], list[bool]]:
    """Choose width vectors: the first half at nearly equal MACs, the second half spread over all MACs.

    MACs alone rank the second half well; in the first half only the shape matters. The shapes of the first half lie far
    from one another (farthest-point sampling on log widths).

    Args:
        space: The search space.
        n: How many, at least 4.
        share: MACs of the first half, as a share of the widest network's.
        spread: The first half's MACs differ from that by at most this share of it.
        seed: Seed of the draw.

    Returns:
        ``n`` different width vectors, and whether each belongs to the first half.

    Raises:
        OptionError: If the space has too few width vectors of such MACs.

    >>> from widthkit.modules.models import create_model
    >>> from widthkit.graph.space import uniform_space
    >>> from widthkit.trace import trace
    >>> graph = trace(create_model("torchvision/resnet18"), (1, 3, 32, 32))
    >>> widths, equal = choose_widths(uniform_space(graph, 8), 6)
    >>> [round(graph.macs(w) / graph.macs(), 2) for w in widths[:3]], equal
    ([0.4, 0.4, 0.4], [True, True, True, False, False, False])
    """
    if n < 4:
        raise OptionError(f"{n} widths are too few to rank; take at least 4")
    vectors = _draws(space, np.random.default_rng(seed))
    shares = space.graph.macs(vectors) / space.graph.macs(space.largest)
    inside = np.flatnonzero(np.abs(shares / share - 1) <= spread)
    half = n // 2
    if len(inside) < half:
        raise OptionError(
            f"only {len(inside)} of {len(vectors)} width vectors have {share:.0%} of the MACs within {spread:.1%}; "
            "take more choices per group"
        )
    equal = inside[_far_apart(np.log(vectors[inside]), half)]
    rest = np.setdiff1d(np.arange(len(vectors)), equal)
    others = rest[_evenly(shares[rest], n - half)]
    chosen = [_named(space, vectors[i]) for i in [*equal.tolist(), *others.tolist()]]
    return chosen, [True] * half + [False] * (n - half)


def _draws(space: SearchSpace, rng: np.random.Generator) -> IntArray:
    """Return different width vectors ``[draws, groups]``, every group drawn from its choices."""
    columns = [rng.choice(np.array(g.options), _DRAWS) for g in space.groups]
    return np.asarray(np.unique(np.stack(columns, axis=1), axis=0), dtype=np.int64)


def _far_apart(points: FloatArray, n: int) -> IntArray:
    """Pick ``n`` rows of ``points [m, dims]``, each the farthest from those before."""
    picked = [int(np.square(points - points.mean(0)).sum(1).argmax())]
    nearest = np.square(points - points[picked[0]]).sum(1)
    while len(picked) < n:
        picked.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.square(points - points[picked[-1]]).sum(1))
    return np.array(picked, dtype=np.int64)


def _evenly(values: FloatArray, n: int) -> IntArray:
    """Pick ``n`` different entries whose values are spread evenly from the smallest to the largest."""
    left = list(np.argsort(values, kind="stable"))
    picked = []
    for wanted in np.linspace(values.min(), values.max(), n):
        nearest = min(range(len(left)), key=lambda i: abs(values[left[i]] - wanted))
        picked.append(int(left.pop(nearest)))
    return np.array(picked, dtype=np.int64)


def _named(space: SearchSpace, vector: IntArray) -> dict[str, int]:
    return {name: int(width) for name, width in zip(space.names, vector, strict=True)}
