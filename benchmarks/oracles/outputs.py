"""Run a model, and compare what it returns with what it should return.

The comparison is in float64 where the model is. Its tolerance covers sums in another order and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from widthkit.graph import ChannelGraph, IntArray
from widthkit.trace.fake_values import FakeValueMode
from widthkit.trace.inputs import as_inputs, float_dtype
from widthkit.trace.outputs import Outputs
from widthkit.trace.recorder import call_model

TOLERANCE = 1e-10
"""Largest relative error that sums in another order explain in float64."""


class OracleError(AssertionError):
    """Two results that must be equal are not."""


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Return all tensors that a model returns.

    Args:
        model: The model; random numbers that it draws are the same in every call.
        inputs: A tensor, a tuple of arguments, or a mapping of keyword arguments.
    """
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # A forward may create numbers, such as grids of coordinates; they should have the model's own precision.
        before = torch.get_default_dtype()
        torch.set_default_dtype(float_dtype(model))
        try:
            return Outputs.of(call_model(model, as_inputs(inputs))).tensors
        finally:
            torch.set_default_dtype(before)


def fake_outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Return all tensors that a model returns, computed from fake values; only their shapes mean something.

    This is for models whose control flow depends on values, which therefore cannot run on the meta device.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]), FakeValueMode(fake_values=True):
        return Outputs.of(call_model(model, as_inputs(inputs))).tensors


def check_equal(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = TOLERANCE) -> None:
    """Compare outputs relative to their size, so that deep nets without norms are judged like others.

    Args:
        actual: What came out.
        expected: What should come out.
        tolerance: Largest relative error.

    Raises:
        OracleError: If shapes, integers or finite numbers differ, or if an expected value is not finite.
    """
    if [a.shape for a in actual] != [e.shape for e in expected]:
        raise OracleError(f"shapes {[tuple(a.shape) for a in actual]} instead of {[tuple(e.shape) for e in expected]}")
    for a, e in zip(actual, expected, strict=True):
        if not e.is_floating_point():
            if not torch.equal(a, e):
                raise OracleError("integer outputs differ")
        elif e.numel():
            if not bool(e.isfinite().all()):
                raise OracleError("the expected outputs are not finite")
            error = relative_error(a, e)
            if not error <= tolerance:  # also true for NaN
                raise OracleError(f"off by {error:.1e}")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected value where that is above 1."""
    return float((actual - expected).abs().max()) / max(1.0, float(expected.abs().max()))


def random_units(graph: ChannelGraph, rng: np.random.Generator, least: float = 0.0) -> dict[str, IntArray]:
    """Draw any units of every group.

    Args:
        graph: The groups.
        rng: The source of randomness.
        least: Smallest share of a group's units; at least one unit is drawn.
    """
    return {
        n: np.sort(rng.permutation(w)[: rng.integers(max(1, round(least * w)), w + 1)]).astype(np.int64)
        for n, w in graph.full.items()
    }


def widths_of(units: Mapping[str, Any]) -> dict[str, int]:
    """Count the units of every group; a number is already a width."""
    return {name: int(kept) if np.ndim(kept) == 0 else len(kept) for name, kept in units.items()}
