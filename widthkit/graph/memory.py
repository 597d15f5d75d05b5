"""Memory at any widths, in closed form: weights plus the peak of activations.

The size of every block of the traced run is a product of affine functions of the widths. The bytes alive after a call
are the sum over the blocks that are alive then. The peak is the largest of these sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from widthkit.errors import BudgetError
from widthkit.graph.arrays import FloatArray, IntArray
from widthkit.graph.program import Program, TensorSpec, is_floating, item_size

_CHUNK = 1 << 22
"""How many sums are computed at a time, so that many width vectors fit into memory."""


@dataclass(frozen=True)
class MemoryModel:
    """Bytes of a model's weights and activations at any widths.

    Args:
        program: The traced run; with ``None`` every method raises.
        n_groups: How many widths a vector has.
    """

    program: Program | None
    n_groups: int
    _products: dict[tuple[int, str | None], tuple[_Sizes, _Sizes]] = field(default_factory=dict, repr=False)

    def total(self, widths: IntArray, *, batch: int = 1, dtype: str | None = None) -> Any:
        """Bytes of weights plus peak activations at widths ``[..., groups]``; see :meth:`ChannelGraph.memory`."""
        return self.weights(widths, dtype=dtype) + self.activations(widths, batch=batch, dtype=dtype)

    def weights(self, widths: IntArray, *, dtype: str | None = None) -> Any:
        """Bytes of parameters and buffers."""
        weights, _ = self._sizes(self._traced_program.batch, dtype)
        return _whole(weights.bytes(widths).sum(axis=-1))

    def activations(self, widths: IntArray, *, batch: int = 1, dtype: str | None = None) -> Any:
        """Bytes of the largest set of activations that are alive at once, the inputs included."""
        return _whole(self._alive_bytes(widths, batch, dtype).max(axis=-1, initial=0.0))

    def peak_call(self, widths: IntArray, *, batch: int = 1, dtype: str | None = None) -> int:
        """Number of the call after which activations peak, at one width vector."""
        points, _ = self._points
        return int(points[int(self._alive_bytes(widths, batch, dtype).argmax())])

    def _alive_bytes(self, widths: IntArray, batch: int, dtype: str | None) -> FloatArray:
        _, blocks = self._sizes(batch, dtype)
        _, alive = self._points
        rows = widths.reshape(math.prod(widths.shape[:-1]), self.n_groups)
        step = max(1, _CHUNK // max(alive.shape[0], 1))
        parts = [blocks.bytes(rows[i : i + step]) @ alive for i in range(0, len(rows), step)]
        return np.concatenate(parts).reshape(*widths.shape[:-1], alive.shape[1])

    @property
    def _traced_program(self) -> Program:
        if self.program is None:
            raise BudgetError(
                "the memory of this model is not known, because a second run of it differs from the first or fails "
                "(graph.notes says which); set a budget on MACs or parameters instead"
            )
        return self.program

    def _sizes(self, batch: int, dtype: str | None) -> tuple[_Sizes, _Sizes]:
        key = (batch, dtype)
        if key not in self._products:
            program = self._traced_program
            extra = program.extra(batch)
            weights = _Sizes.of(list(program.weights), [1.0] * len(program.weights), 0, dtype, self.n_groups)
            tensors, shares = [b.tensor for b in program.blocks], [b.share for b in program.blocks]
            self._products[key] = weights, _Sizes.of(tensors, shares, extra, dtype, self.n_groups)
        return self._products[key]

    @cached_property
    def _points(self) -> tuple[IntArray, FloatArray]:
        """Return ``(calls [points], alive [blocks, points])`` for the calls at which the peak may be."""
        program = self._traced_program
        first = np.array([b.first_call for b in program.blocks], dtype=np.int64)
        end = np.array([b.end_call for b in program.blocks], dtype=np.int64)
        calls = np.arange(len(program.calls), dtype=np.int64)
        alive = (first[:, None] <= calls) & (calls < end[:, None])
        # Skip calls whose alive blocks are all alive after the next call, or after the last one kept.
        kept: list[int] = []
        for p in calls.tolist():
            inside_next = p + 1 < len(calls) and not (alive[:, p] & ~alive[:, p + 1]).any()
            inside_last = bool(kept) and not (alive[:, p] & ~alive[:, kept[-1]]).any()
            if not inside_next and not inside_last:
                kept.append(p)
        points = np.array(kept, dtype=np.int64)
        return points, alive[:, points].astype(np.float64)


@dataclass(frozen=True)
class _Sizes:
    """Bytes of many tensors.

    Args:
        forms: ``[forms, 1 + groups]``: the distinct affine functions.
        factors: ``[tensors, dims]``: which of them every dim is; form 0 is the constant 1.
        scales: ``[tensors]``: bytes per unit of the product.
    """

    forms: FloatArray
    factors: IntArray
    scales: FloatArray

    @classmethod
    def of(cls, tensors: list[TensorSpec], shares: list[float], extra: int, dtype: str | None, n: int) -> _Sizes:
        one = np.zeros(1 + n)
        one[0] = 1
        table, rows = [one], {one.tobytes(): 0}
        per_tensor: list[list[int]] = []
        scales = []
        for tensor, share in zip(tensors, shares, strict=True):
            kind = dtype if dtype is not None and is_floating(tensor.dtype) else tensor.dtype
            scale = share * item_size(kind)
            factors = []
            for dim in tensor.dims:
                scale *= dim.scale(extra)
                if dim.varies:
                    form = dim.form.astype(np.float64)
                    factors.append(rows.setdefault(form.tobytes(), len(table)))
                    if factors[-1] == len(table):
                        table.append(form)
                else:
                    scale *= int(dim.form[0])
            per_tensor.append(factors)
            scales.append(scale)
        width = max(map(len, per_tensor), default=0)
        padded = [factors + [0] * (width - len(factors)) for factors in per_tensor]
        return cls(np.stack(table), np.array(padded, dtype=np.int64).reshape(len(tensors), width), np.array(scales))

    def bytes(self, widths: IntArray) -> FloatArray:
        """Return ``[..., tensors]``."""
        values = widths.astype(np.float64) @ self.forms[:, 1:].T + self.forms[:, 0]
        product: FloatArray = np.broadcast_to(self.scales, (*values.shape[:-1], len(self.scales))).copy()
        for column in self.factors.T:
            product *= values[..., column]
        return product


def _whole(value: FloatArray) -> Any:
    exact = np.asarray(np.rint(value), dtype=np.int64)
    return int(exact) if exact.ndim == 0 else exact
