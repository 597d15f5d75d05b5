"""The growth oracle: a network that grows and shrinks back is the network as it was, bit by bit.

The truth is the model before it grew.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.oracles.macs import n_params
from benchmarks.oracles.outputs import OracleError, check_equal, outputs
from benchmarks.oracles.permutation import check_permutation
from widthkit.graph import ChannelGraph
from widthkit.graph.plan import apply_plan, make_plan
from widthkit.graph.resize import grow
from widthkit.modules.clone import named_tensors


def check_growth(model: nn.Module, graph: ChannelGraph, inputs: Any, rng: np.random.Generator) -> None:
    """Give every group up to three more units, check the wider network, and take them away again.

    Raises:
        OracleError: If the wider network's sizes, costs or symmetry are wrong, or if a tensor has changed.
    """
    wider = {n: w + int(rng.integers(0, 4)) for n, w in graph.full.items()}
    plan, wide_graph = grow(graph, wider)
    wide = apply_plan(model, plan)
    if wide_graph.full != wider:
        raise OracleError(f"the grown graph has widths {wide_graph.full}, not {wider}")
    if not wide_graph.params() == n_params(wide) == graph.params(wider):
        raise OracleError(
            f"{graph.params(wider)} or {wide_graph.params()} parameters predicted, {n_params(wide)} found"
        )
    if not all(bool(t.isfinite().all()) for t in outputs(wide, inputs)):
        raise OracleError("the grown network's outputs are not finite")
    check_permutation(wide, wide_graph, inputs, rng)
    back = apply_plan(wide, make_plan(wide_graph, graph.full))
    after = named_tensors(back)
    for name, tensor in named_tensors(model).items():
        if not torch.equal(after[name], tensor):
            raise OracleError(f"{name} has changed after growing and shrinking back")
    check_equal(outputs(back, inputs), outputs(model, inputs))
