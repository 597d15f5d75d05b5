"""Predict the latency of any widths: the sum over all operators, corrected on a few whole networks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.optimize import nnls
from torch import nn

from widthkit.errors import BudgetError, one_line
from widthkit.graph import ChannelGraph, FloatArray, IntArray
from widthkit.latency.batched import BatchedCurves
from widthkit.latency.cache import Cache
from widthkit.latency.conditions import Conditions
from widthkit.latency.kernels import KernelUse, kernel_uses
from widthkit.latency.measure import network_seconds
from widthkit.latency.tables import Clocks, measured_curves

Build = Callable[[Mapping[str, int]], nn.Module]
N_NETWORKS = 10
"""Number of whole networks on which the correction is fitted."""
_OVERHEAD = 2e-6
"""Assumed seconds per operator call that kernels do not show; used until whole networks are measured."""
_REGULARISATION = 0.05
"""Weight of the prior "no correction" in the fit, in relative error per network."""


@dataclass(frozen=True)
class Correction:
    """Converts the seconds of a network's operators to those of the network: ``constant + factors . sums``.

    Args:
        constant: Seconds that do not depend on the widths.
        factors: Factor of contractions, factor of other operators, seconds per byte of weights.
        error: Median relative error on the networks of the fit; ``None`` without networks.
    """

    constant: float
    factors: tuple[float, float, float]
    error: float | None

    def __call__(self, sums: FloatArray) -> FloatArray:
        """Return ``[...]`` seconds for sums ``[..., 3]``."""
        return np.asarray(self.constant + sums @ np.array(self.factors))

    @classmethod
    def fit(cls, sums: FloatArray, seconds: FloatArray, constant: float) -> Correction:
        """Fit networks with sums ``[n, 3]`` and measured seconds ``[n]``; ``constant`` is the prior of the constant.

        All errors are relative. With few networks the result stays near the plain sum.
        """
        n = len(seconds)
        columns = np.concatenate([np.ones((n, 1)), sums], axis=1) / seconds[:, None]
        prior = np.array([constant, 1.0, 1.0, 0.0])
        typical = np.maximum(np.abs(columns).mean(axis=0), 1e-30)
        pull = np.diag(_REGULARISATION * typical)
        solved, _ = nnls(np.concatenate([columns, pull]), np.concatenate([np.ones(n), pull @ prior]))
        error = float(np.median(np.abs(columns @ solved - 1)))
        return cls(float(solved[0]), (float(solved[1]), float(solved[2]), float(solved[3])), error)


class LatencyModel:
    """Latency of any widths of one model under given conditions.

    Nothing is measured before the first prediction. Measurements are kept on disk.

    Args:
        graph: The model's channel graph.
        conditions: Device, batch size, number type, memory format.
        build: Builds the network of given widths, so that whole networks can be measured. Without it, networks that
            were measured earlier are used, if there are any.
        cache: Earlier measurements; the device's own file by default.
        measure: Times whole networks.
        clocks: Times kernels.

    Raises:
        BudgetError: If the machine lacks the device, or the model's run is not known at this batch size.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        conditions: Conditions,
        build: Build | None = None,
        *,
        cache: Cache | None = None,
        measure: Callable[..., dict[str, float]] = network_seconds,
        clocks: Clocks | None = None,
    ) -> None:
        if graph.program is None:
            raise BudgetError(
                "latency is not known, because two runs of this model call different operators; "
                "use a budget of MACs or parameters"
            )
        graph.program.extra(conditions.batch)
        conditions.check()
        self.graph = graph
        self.program = graph.program
        self.conditions = conditions
        self.build = build
        self._given_cache = cache
        self._measure = measure
        self._clocks = clocks or Clocks()
        self._curves: BatchedCurves | None = None
        self._widest: IntArray | None = None
        self._correction: Correction | None = None

    def predict_ms(self, widths: Any = None) -> Any:
        """Return milliseconds of one pass: a float for one width vector, else an array ``[...]``.

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
        assert self._curves is not None
        contracted, others = self._curves.seconds(vectors)
        weights = self.graph.memory_model.weights(vectors, dtype=self.conditions.dtype)
        return np.stack([contracted, others, np.asarray(weights, dtype=np.float64)], axis=-1)

    def measure_ms(self, networks: Mapping[str, nn.Module]) -> dict[str, float]:
        """Measure whole networks in turns and return name -> milliseconds.

        Raises:
            BudgetError: If a network does not run under the conditions.
        """
        return {name: 1000 * value for name, value in self._seconds(networks).items()}

    def _seconds(self, networks: Mapping[str, nn.Module]) -> dict[str, float]:
        try:
            return self._measure(networks, self.program, self.conditions)
        except (RuntimeError, MemoryError, TypeError, ValueError) as error:
            raise BudgetError(
                f"the network does not run under {self.conditions} ({type(error).__name__}: {one_line(error)}); "
                "choose another batch size, type or memory format"
            ) from error

    def correct(self, widths: Sequence[Mapping[str, int]], milliseconds: Sequence[float]) -> None:
        """Fit the correction on networks that the caller has measured, and store them in the cache."""
        rows = [{"widths": dict(w), "seconds": ms / 1000} for w, ms in zip(widths, milliseconds, strict=True)]
        self.cache.add_networks(self.key, rows)
        self.cache.save()
        self._correction = None

    @property
    def correction(self) -> Correction:
        """The correction of the sums."""
        self._prepare(self.graph.vector())
        assert self._correction is not None
        return self._correction

    @property
    def device(self) -> dict[str, Any]:
        """The device of the times, as :func:`widthkit.latency.cache.describe_device` describes it."""
        return dict(self.cache.device)

    @property
    def copied(self) -> list[str]:
        """Operators that cannot run alone; copies of their results were timed."""
        return sorted({u.kernel.label for u in self.uses if self.cache.copied(u.kernel.key)})

    @cached_property
    def cache(self) -> Cache:
        """The measurements of the device."""
        return self._given_cache or Cache(self.conditions.device or "cpu")

    @cached_property
    def uses(self) -> list[KernelUse]:
        """The kernels of the network."""
        return kernel_uses(self.program, self.conditions)

    @cached_property
    def key(self) -> str:
        """Cache key of whole networks: a hash of the kernels, of their sizes by widths, and of the conditions."""
        digest = hashlib.sha256(str(self.conditions).encode())
        for use in self.uses:
            digest.update(f"{use.kernel.key} {use.count}".encode() + np.ascontiguousarray(use.forms).tobytes())
        return digest.hexdigest()[:24]

    def _prepare(self, vectors: IntArray) -> None:
        self._prepare_tables(vectors)
        if self._correction is None:
            self._correction = self._fit_correction()

    def _prepare_tables(self, vectors: IntArray) -> None:
        """Measure what is missing up to the widest of these widths, at least up to the model's own."""
        widest = np.maximum(vectors.max(axis=tuple(range(vectors.ndim - 1)), initial=0), self.graph.group_widths)
        if self._widest is not None and (widest <= self._widest).all():
            return
        self._widest = widest if self._widest is None else np.maximum(widest, self._widest)
        curves = measured_curves(self.uses, self._widest, self.conditions, self.cache, self._clocks)
        self._curves = BatchedCurves.of(self.uses, curves, self._widest)

    def _fit_correction(self) -> Correction:
        rows = self.cache.networks(self.key)
        if not rows and self.build is not None:
            with self.cache.locked():
                rows = self.cache.networks(self.key)
                if not rows:
                    rows = self._measure_networks(self.build)
                    self.cache.add_networks(self.key, rows)
                    self.cache.save()
        overhead = _OVERHEAD * len(self.program.calls)
        if not rows:
            return Correction(overhead, (1.0, 1.0, 0.0), None)
        vectors = self.graph.vector([row["widths"] for row in rows])
        return Correction.fit(self.sums(vectors), np.array([row["seconds"] for row in rows]), overhead)

    def _measure_networks(self, build: Build) -> list[dict[str, Any]]:
        chosen = spread_widths(self.graph, N_NETWORKS)
        networks = {str(i): build(widths) for i, widths in enumerate(chosen)}
        seconds = self._seconds(networks)
        return [{"widths": widths, "seconds": seconds[str(i)]} for i, widths in enumerate(chosen)]


def spread_widths(graph: ChannelGraph, n: int) -> list[dict[str, int]]:
    """Choose ``n`` width vectors: the model's own, then random ones from narrow to wide, always the same."""
    return [graph.full, *random_widths(graph, np.linspace(0.2, 0.9, n - 1).tolist(), np.random.default_rng(0))]


def random_widths(graph: ChannelGraph, means: Sequence[float], rng: np.random.Generator) -> list[dict[str, int]]:
    """Draw one width vector per mean ratio; the ratios of its groups are normal with a standard deviation of 0.2."""
    found = []
    for mean in means:
        shares = np.clip(rng.normal(mean, 0.2, len(graph.group_names)), 0.1, 1.0)
        widths = np.maximum(1, np.rint(shares * graph.group_widths)).astype(int)
        found.append(dict(zip(graph.group_names, widths.tolist(), strict=True)))
    return found
