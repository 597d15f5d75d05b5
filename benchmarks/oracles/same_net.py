"""The same-net oracle: the exported network computes what the supernet computes at the same widths.

The truth is the supernet's forward pass on slices of its own tensors; the exported network holds copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from benchmarks.oracles.outputs import TOLERANCE, OracleError, check_equal, outputs
from widthkit.export.dense import export
from widthkit.graph import ChannelGraph
from widthkit.supernet import Supernet, make_supernet


def supernet_of(model: nn.Module, graph: ChannelGraph, strategy: str = "bc") -> Supernet:
    """Return a supernet to check, with five choices per group; ``bc`` has two paths per width."""
    return make_supernet(model, strategy, graph=graph, k=5).eval()


def check_same_net(net: Supernet, inputs: Any, widths: Mapping[str, int], tolerance: float = TOLERANCE) -> None:
    """Compare on every path of some widths.

    Raises:
        OracleError: If the outputs differ, or if the exported network is still a supernet.
    """
    for path in range(len(net.paths(widths))):
        expected = outputs(net.set_widths(widths, path), inputs)
        slim = export(net, widths, path=path)
        if isinstance(slim, Supernet):
            raise OracleError("the exported network is a supernet")
        try:
            check_equal(outputs(slim, inputs), expected, tolerance)
        except OracleError as error:
            raise OracleError(f"{error}, at path {path} of widths {dict(widths)}") from error
