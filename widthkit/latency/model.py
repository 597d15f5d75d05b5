"""Predict the latency of any widths: the sum over operators, corrected on a few whole networks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls
from torch import nn

from widthkit.errors import BudgetError
from widthkit.graph import ChannelGraph
from widthkit.latency.cache import Cache
from widthkit.latency.conditions import Conditions
from widthkit.latency.fit import Curve
from widthkit.latency.kernels import IntArray, Use, uses_of
from widthkit.latency.pack import Packed
from widthkit.latency.replay import network_seconds
from widthkit.latency.tables import curves

FloatArray = npt.NDArray[np.float64]
Build = Callable[[Mapping[str, int]], nn.Module]
NETWORKS = 10
"""Whole networks that the correction is fitted on."""
_OVERHEAD = 2e-6
"""Seconds per operator call that a table of operators cannot see, until whole networks say it."""
_PULL = 0.05
"""How strongly the correction is pulled towards "none", in relative error per network."""


@dataclass(frozen=True)
class Correction:
    """Seconds of a network from those of its operators: ``constant + factors . sums``.

    Args:
        constant: Seconds that do not depend on the widths.
        factors: One per kind of operator: contractions, others; and seconds per byte of weights.
        error: Median relative error on the networks it was fitted on; ``None`` where there were none.
    """

    constant: float
    factors: tuple[float, float, float]
    error: float | None

    def __call__(self, sums: FloatArray) -> FloatArray:
        """Return ``[...]`` seconds for sums ``[..., 3]``."""
        return np.asarray(self.constant + sums @ np.array(self.factors))

    @classmethod
    def fit(cls, sums: FloatArray, seconds: FloatArray, constant: float) -> Correction:
        """Fit networks ``[n, 3]`` with known seconds ``[n]``, starting from a guess of the constant.

        All errors are relative. With few networks the result stays near the plain sum.
        """
        n = len(seconds)
        columns = np.concatenate([np.ones((n, 1)), sums], axis=1) / seconds[:, None]
        prior = np.array([constant, 1.0, 1.0, 0.0])
        typical = np.maximum(np.abs(columns).mean(axis=0), 1e-30)
        pull = np.diag(_PULL * typical)
        solved, _ = nnls(np.concatenate([columns, pull]), np.concatenate([np.ones(n), pull @ prior]))
        error = float(np.median(np.abs(columns @ solved - 1)))
        return cls(float(solved[0]), (float(solved[1]), float(solved[2]), float(solved[3])), error)


class LatencyModel:
    """Latency of any widths of one model under given conditions.

    Nothing is measured before the first question. What is measured is kept on disk for the next time.

    Args:
        graph: The model's channel graph.
        conditions: Where and how it runs.
        build: Makes the network of given widths, so that sums can be corrected on whole networks; without it the
            correction of an earlier time is used where there is one.
        cache: Known measurements; the device's own file by default.
        measure: Times whole networks; for tests.
        options: Passed to :func:`widthkit.latency.tables.curves`.

    Raises:
        BudgetError: If the device is not here, or the model's run is not known at this batch size.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        conditions: Conditions,
        build: Build | None = None,
        *,
        cache: Cache | None = None,
        measure: Callable[..., dict[str, float]] = network_seconds,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if graph.program is None:
            raise BudgetError("latency is not known: two runs of this model call different operators")
        graph.program.extra(conditions.batch)
        conditions.check()
        self.graph = graph
        self.program = graph.program
        self.conditions = conditions
        self.build = build
        self._given_cache = cache
        self._measure = measure
        self._options = dict(options or {})
        self._curves: dict[str, Curve] = {}
        self._packed: Packed | None = None
        self._reach: IntArray | None = None
        self._correction: Correction | None = None

    def predict_ms(self, widths: Any = None) -> Any:
        """Milliseconds of one pass: a float for one width vector, else an array ``[...]``.

        Args:
            widths: As in :meth:`ChannelGraph.macs`.
        """
        vectors = self.graph.vector(widths)
        self._prepare(vectors)
        assert self._correction is not None
        value = 1000 * self._correction(self.sums(vectors))
        return float(value) if value.ndim == 0 else value

    def sums(self, vectors: IntArray) -> FloatArray:
        """Return ``[..., 3]``: seconds of contractions, seconds of other operators, bytes of weights."""
        self._prepare_tables(vectors)
        assert self._packed is not None
        contracted, others = self._packed.seconds(vectors)
        weights = self.graph.memory_model.weights(vectors, dtype=self.conditions.dtype)
        return np.stack([contracted, others, np.asarray(weights, dtype=np.float64)], axis=-1)

    def measure_ms(self, networks: Mapping[str, nn.Module], repeats: int = 9) -> dict[str, float]:
        """Measure whole networks in turns: name -> milliseconds."""
        return {name: 1000 * value for name, value in self._seconds(networks, repeats).items()}

    def _seconds(self, networks: Mapping[str, nn.Module], repeats: int = 9) -> dict[str, float]:
        try:
            return self._measure(networks, self.program, self.conditions, repeats)
        except (RuntimeError, NotImplementedError, MemoryError, TypeError, ValueError) as error:
            why = " ".join(str(error).split())[:160]
            raise BudgetError(
                f"the network does not run under {self.conditions} ({type(error).__name__}: {why}); "
                "choose another batch size, type or memory format"
            ) from error

    def correct(self, widths: Sequence[Mapping[str, int]], milliseconds: Sequence[float]) -> None:
        """Fit the correction on networks that were measured elsewhere, and keep them for the next time."""
        rows = [{"widths": dict(w), "seconds": ms / 1000} for w, ms in zip(widths, milliseconds, strict=True)]
        self.cache.add_networks(self.key, rows)
        self.cache.save()
        self._correction = None

    @property
    def correction(self) -> Correction:
        """What the sums are corrected with."""
        self._prepare(self.graph.vector())
        assert self._correction is not None
        return self._correction

    @property
    def device(self) -> dict[str, Any]:
        """What the times were measured on."""
        return dict(self.cache.device)

    @property
    def copied(self) -> list[str]:
        """Operators that could not run alone; copies of their results were timed instead."""
        return sorted({u.kernel.label for u in self.uses if self.cache.copied(u.kernel.key)})

    @cached_property
    def cache(self) -> Cache:
        """The measurements."""
        return self._given_cache or Cache(self.conditions.device or "cpu")

    @cached_property
    def uses(self) -> list[Use]:
        """The kernels of the network."""
        return uses_of(self.program, self.conditions)

    @cached_property
    def key(self) -> str:
        """What whole networks are kept under: the kernels, how they depend on the widths, and the conditions."""
        digest = hashlib.sha256(str(self.conditions).encode())
        for use in self.uses:
            digest.update(f"{use.kernel.key} {use.count}".encode() + np.ascontiguousarray(use.forms).tobytes())
        return digest.hexdigest()[:24]

    def _prepare(self, vectors: IntArray) -> None:
        self._prepare_tables(vectors)
        if self._correction is None:
            self._correction = self._corrected()

    def _prepare_tables(self, vectors: IntArray) -> None:
        """Measure what is missing up to the widest of these widths, and never less than the model itself."""
        widest = np.maximum(vectors.max(axis=tuple(range(vectors.ndim - 1)), initial=0), self.graph.group_widths)
        if self._reach is not None and (widest <= self._reach).all():
            return
        self._reach = widest if self._reach is None else np.maximum(widest, self._reach)
        self._curves = curves(self.uses, self._reach, self.conditions, self.cache, **self._options)
        self._packed = Packed.of(self.uses, self._curves, self._reach)

    def _corrected(self) -> Correction:
        rows = self.cache.networks(self.key)
        if not rows and self.build is not None:
            with self.cache.locked():
                rows = self.cache.networks(self.key)
                if not rows:
                    rows = self._whole_networks(self.build)
                    self.cache.add_networks(self.key, rows)
                    self.cache.save()
        overhead = _OVERHEAD * len(self.program.calls)
        if not rows:
            return Correction(overhead, (1.0, 1.0, 0.0), None)
        vectors = self.graph.vector([row["widths"] for row in rows])
        return Correction.fit(self.sums(vectors), np.array([row["seconds"] for row in rows]), overhead)

    def _whole_networks(self, build: Build) -> list[dict[str, Any]]:
        chosen = spread_widths(self.graph, NETWORKS)
        networks = {str(i): build(widths) for i, widths in enumerate(chosen)}
        seconds = self._seconds(networks)
        return [{"widths": widths, "seconds": seconds[str(i)]} for i, widths in enumerate(chosen)]


def spread_widths(graph: ChannelGraph, n: int, seed: int = 0) -> list[dict[str, int]]:
    """Choose ``n`` width vectors: the model itself, then random ones from narrow to wide."""
    return [graph.full, *random_widths(graph, np.linspace(0.2, 0.9, n - 1).tolist(), np.random.default_rng(seed))]


def random_widths(graph: ChannelGraph, middles: Sequence[float], rng: np.random.Generator) -> list[dict[str, int]]:
    """Draw one width vector around every middle ratio; the ratios of its groups spread by 0.2."""
    found = []
    for middle in middles:
        shares = np.clip(rng.normal(middle, 0.2, len(graph.group_names)), 0.1, 1.0)
        widths = np.maximum(1, np.rint(shares * graph.group_widths)).astype(int)
        found.append(dict(zip(graph.group_names, widths.tolist(), strict=True)))
    return found
