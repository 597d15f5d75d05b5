"""Independent truth about a channel graph, in float64.

Nothing here looks inside the tracer. The tolerance covers sums in another order and nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from widthkit.export.dense import export
from widthkit.graph import ChannelGraph, IntArray
from widthkit.modules.clone import named_tensors
from widthkit.supernet import make_supernet
from widthkit.trace.context import flat_tensors
from widthkit.trace.fake_values import FakeValueMode
from widthkit.trace.inputs import Inputs, Keywords, float_dtype
from widthkit.trace.recorder import call_model

TOLERANCE = 1e-10
_FVCORE = ("conv", "linear", "matmul", "bmm", "einsum", "addmm", "baddbmm")


class CheckError(Exception):
    """An oracle that does not hold."""


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return all tensors that a model returns."""
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Numbers that a forward makes up, such as grids of coordinates, should have the model's own precision.
        before = torch.get_default_dtype()
        torch.set_default_dtype(float_dtype(model))
        try:
            return flat_tensors((call_model(model, inputs),))
        finally:
            torch.set_default_dtype(before)


def same(actual: list[Tensor], expected: list[Tensor], tolerance: float = TOLERANCE) -> None:
    """Compare outputs relative to their size, so that unnormalised deep nets are judged like others.

    Raises:
        CheckError: Saying by how much they differ.
    """
    if [a.shape for a in actual] != [e.shape for e in expected]:
        raise CheckError(f"shapes {[tuple(a.shape) for a in actual]} instead of {[tuple(e.shape) for e in expected]}")
    for a, e in zip(actual, expected, strict=True):
        if not e.is_floating_point():
            if not torch.equal(a, e):
                raise CheckError("integer outputs differ")
        elif e.numel():
            if not bool(e.isfinite().all()):
                raise CheckError("the outputs are not finite")
            error = relative_error(a, e)
            if not error <= tolerance:
                raise CheckError(f"off by {error:.1e}")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected value where that is above 1."""
    return float((actual - expected).abs().max()) / max(1.0, float(expected.abs().max()))


def random_units(graph: ChannelGraph, rng: np.random.Generator, least: float = 0.25) -> dict[str, IntArray]:
    """Draw any units of every group, at least a quarter of them."""
    return {
        n: np.sort(rng.permutation(w)[: rng.integers(max(1, round(least * w)), w + 1)]).astype(np.int64)
        for n, w in graph.full.items()
    }


def permuted(
    model: nn.Module, graph: ChannelGraph, rng: np.random.Generator, names: Iterable[str] | None = None
) -> nn.Module:
    """Return a copy in which the units of the named groups (of all) have changed places, at all their sites."""
    model = copy.deepcopy(model)
    tensors = named_tensors(model)
    for name in graph.groups if names is None else names:
        group = graph.groups[name]
        order = rng.permutation(group.width)
        if (order == np.arange(group.width)).all():
            order = np.roll(order, 1)
        for site in group.sites:
            tensor = tensors[site.tensor].data
            index = np.arange(tensor.shape[site.dim])
            index[site.index.reshape(-1)] = site.index[order].reshape(-1)
            tensor.copy_(tensor.index_select(site.dim, torch.from_numpy(index)))
    return model


def check_same_net(
    model: nn.Module, graph: ChannelGraph, inputs: Inputs, rng: np.random.Generator, tolerance: float = TOLERANCE
) -> None:
    """What a supernet computes at random widths is what the exported network computes."""
    net = make_supernet(model, "ua", graph=graph, k=5).eval()
    widths = net.space.sample(rng)
    expected = outputs(net.set_widths(widths), inputs)
    same(outputs(export(net, widths), inputs), expected, tolerance)


def n_params(model: nn.Module) -> int:
    """Count parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def hollow_outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return all tensors that a model returns whose control flow depends on values; only their shapes mean anything."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), FakeValueMode(fake_values=True):
        return flat_tensors((call_model(model, inputs),))


def counted_macs(model: nn.Module, inputs: Inputs, hollow: bool = False) -> int:
    """Multiply-adds as ``torch.utils.flop_counter`` counts them: convolutions, matrix products, fused attention.

    Args:
        model: On any device, the meta device too.
        inputs: On the same.
        hollow: Whether to make up values, for models that decide on them.
    """
    # The counter's hooks look for gradients of a module's inputs where these are parameters (class tokens).
    free = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in free:
            parameter.requires_grad_(False)
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            FakeValueMode(fake_values=True) if hollow else contextlib.nullcontext(),
            FlopCounterMode(display=False) as counter,
        ):
            call_model(model, inputs)
    finally:
        for parameter in free:
            parameter.requires_grad_(True)
    return int(counter.get_total_flops()) // 2


def fvcore_macs(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-adds that fvcore counts for convolutions and matrix products.

    fvcore 0.1.5 counts fused attention and convolutions with string padding as nothing.
    """
    from fvcore.nn import FlopCountAnalysis

    logging.getLogger("fvcore").setLevel(logging.ERROR)
    values = tuple(inputs[0].values()) if isinstance(inputs[0], Keywords) else inputs
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        analysis = FlopCountAnalysis(model, values).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counts: Mapping[str, Any] = analysis.tracer_warnings("none").by_operator()
    return int(sum(counts.get(name, 0) for name in _FVCORE))
