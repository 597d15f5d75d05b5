"""The cost oracles: MACs and parameters of an exported network, counted from the network itself.

The truths are ``torch.utils.flop_counter``, fvcore, and the sizes of the parameters; all must agree to the last digit.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.oracles.outputs import OracleError, widths_of
from widthkit.export.dense import export
from widthkit.graph import ChannelGraph
from widthkit.trace.fake_values import FakeValueMode
from widthkit.trace.inputs import Keywords, as_inputs
from widthkit.trace.recorder import call_model

_FVCORE = ("conv", "linear", "matmul", "bmm", "einsum", "addmm", "baddbmm")


def n_params(model: nn.Module) -> int:
    """Count parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def counted_macs(model: nn.Module, inputs: Any, fake_values: bool = False) -> int:
    """Count multiply-adds by ``torch.utils.flop_counter``: convolutions, matrix products, fused attention.

    Args:
        model: On any device, the meta device too.
        inputs: On the same device.
        fake_values: Whether to compute with fake values, for models whose control flow depends on values.
    """
    # The counter's hooks look for gradients of a module's inputs where these are parameters (class tokens).
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            FakeValueMode(fake_values=True) if fake_values else contextlib.nullcontext(),
            FlopCounterMode(display=False) as counter,
        ):
            call_model(model, as_inputs(inputs))
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return int(counter.get_total_flops()) // 2


def fvcore_macs(model: nn.Module, inputs: Any) -> int:
    """Count multiply-adds of convolutions and matrix products by fvcore.

    fvcore 0.1.5 counts nothing for fused attention and for convolutions with string padding.
    """
    from fvcore.nn import FlopCountAnalysis

    logging.getLogger("fvcore").setLevel(logging.ERROR)
    arguments = as_inputs(inputs)
    values = tuple(arguments[0].values()) if isinstance(arguments[0], Keywords) else arguments
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        analysis = FlopCountAnalysis(model, values).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counts: Mapping[str, Any] = analysis.tracer_warnings("none").by_operator()
    return int(sum(counts.get(name, 0) for name in _FVCORE))


def check_macs(graph: ChannelGraph, widths: Mapping[str, int], counted: int) -> None:
    """Compare the graph's MACs with those counted on the inputs that were traced, a batch of any size.

    Raises:
        OracleError: Naming both numbers.
    """
    predicted = int(graph.macs(widths)) * graph.cost.macs_polynomial.divisor
    if predicted != counted:
        raise OracleError(f"{predicted} MACs predicted, {counted} counted")


def check_params(graph: ChannelGraph, widths: Mapping[str, int], slim: nn.Module) -> None:
    """Compare the graph's number of parameters with that of the network.

    Raises:
        OracleError: Naming both numbers.
    """
    if graph.params(widths) != n_params(slim):
        raise OracleError(f"{graph.params(widths)} parameters predicted, {n_params(slim)} counted")


def check_cost(model: nn.Module, graph: ChannelGraph, x: Tensor, units: Mapping[str, Any]) -> None:
    """Export a model and compare its parameters, and by fvcore its MACs for one image.

    Args:
        model: The model.
        graph: Its graph.
        x: ``[N, ...]``; the first example is counted.
        units: Units or widths of every group.

    Raises:
        OracleError: Naming both numbers.
    """
    slim, widths = export(model, units, graph=graph), widths_of(units)
    check_params(graph, widths, slim)
    counted = fvcore_macs(slim, x[:1])
    if graph.macs(widths) != counted:
        raise OracleError(f"{graph.macs(widths)} MACs predicted, {counted} counted by fvcore")
