"""What the open units cost, as a tensor: MACs and parameters exactly, latency as it is predicted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from widthkit.budget import Budget, Limit
from widthkit.errors import OptionError
from widthkit.graph import ChannelGraph, FloatArray, IntArray
from widthkit.graph.cost import Polynomial

Slope = Callable[[IntArray], tuple[float, FloatArray]]
"""Returns the cost of widths ``[groups]``, and its derivative by every width."""
_STEP = 1 / 8
"""Widths are moved by this share of the full width for the slope of a latency, which moves in steps by itself."""


@dataclass(frozen=True)
class Bound:
    """One bound that gates can be trained for.

    Args:
        limit: The bound.
        dense: What the model as it is costs.
        slope: Cost and derivative.
    """

    limit: Limit
    dense: float
    slope: Slope

    def excess(self, widths: Tensor) -> Tensor:
        """Return the excess over the bound, as a share of the model's cost; gradients reach the widths (PaS, Eq. 5).

        Args:
            widths: ``[groups]``, float64, whole numbers.
        """
        cost: Tensor = _Cost.apply(widths, self.slope)  # type: ignore[no-untyped-call]
        return (cost - self.limit.value) / self.dense


def bounds_of(budget: Budget, graph: ChannelGraph) -> tuple[Bound, ...]:
    """Return the bounds on MACs, parameters and latency.

    Args:
        budget: The target.
        graph: The channel graph of the model.

    Raises:
        OptionError: If there is none: the memory of a network is no sum over its units.
    """
    found = []
    for limit in budget.limits:
        slope: Slope
        if limit.kind == "latency":
            slope = _of_latency(limit, graph)
        elif limit.kind in ("macs", "params"):
            model = graph.cost
            slope = _of_polynomial(model.macs_polynomial if limit.kind == "macs" else model.params_polynomial)
        else:
            continue
        found.append(Bound(limit, float(limit.cost(graph, graph.full)), slope))
    if not found:
        raise OptionError(
            f"target '{budget}': gates are trained for MACs, parameters or latency; add a bound on one of these"
        )
    return tuple(found)


def _of_polynomial(polynomial: Polynomial) -> Slope:
    def slope(widths: IntArray) -> tuple[float, FloatArray]:
        value = float(polynomial.per_term(widths).sum() / polynomial.divisor)
        return value, np.asarray(polynomial.gradient(widths), dtype=np.float64)

    return slope


def _of_latency(limit: Limit, graph: ChannelGraph) -> Slope:
    """Take differences of predictions: every group a step wider and a step narrower."""

    def slope(widths: IntArray) -> tuple[float, FloatArray]:
        n = len(widths)
        step = np.maximum(1, np.rint(_STEP * graph.group_widths)).astype(np.int64)
        wider, narrower = (
            np.maximum(widths, np.minimum(widths + step, graph.group_widths)),
            np.maximum(widths - step, 1),
        )
        vectors = np.tile(widths, (2 * n + 1, 1))
        vectors[np.arange(n), np.arange(n)] = wider
        vectors[n + np.arange(n), np.arange(n)] = narrower
        found = np.asarray(limit.cost(graph, vectors), dtype=np.float64)
        return float(found[-1]), (found[:n] - found[n : 2 * n]) / np.maximum(wider - narrower, 1)

    return slope


class _Cost(torch.autograd.Function):
    """A cost ``[groups] -> scalar`` in float64, with its derivative."""

    @staticmethod
    def forward(ctx: Any, widths: Tensor, slope: Slope) -> Tensor:
        """Evaluate the cost."""
        value, by_width = slope(np.rint(widths.detach().cpu().numpy()).astype(np.int64))
        ctx.slope = widths.new_tensor(by_width)
        return widths.new_tensor(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Multiply the incoming gradient by the derivative."""
        return grads[0] * ctx.slope, None
