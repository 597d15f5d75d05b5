"""Independent truths about a channel graph, for tests and benchmarks alike; nothing here looks inside the tracer."""

from benchmarks.oracles.cut import check_cut, why_not
from benchmarks.oracles.growth import check_growth
from benchmarks.oracles.macs import check_cost, check_macs, check_params, counted_macs, fvcore_macs, n_params
from benchmarks.oracles.outputs import (
    TOLERANCE,
    OracleError,
    check_equal,
    fake_outputs,
    outputs,
    random_units,
    relative_error,
    widths_of,
)
from benchmarks.oracles.permutation import check_permutation, permuted
from benchmarks.oracles.same_net import check_same_net, supernet_of

__all__ = [
    "TOLERANCE",
    "OracleError",
    "check_cost",
    "check_cut",
    "check_equal",
    "check_growth",
    "check_macs",
    "check_params",
    "check_permutation",
    "check_same_net",
    "counted_macs",
    "fake_outputs",
    "fvcore_macs",
    "n_params",
    "outputs",
    "permuted",
    "random_units",
    "relative_error",
    "supernet_of",
    "why_not",
    "widths_of",
]
