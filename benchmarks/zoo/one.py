"""One model of the zoo: everything that is measured about it."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.oracles import checks, cut
from benchmarks.oracles.checks import CheckError
from benchmarks.zoo import build as builder
from benchmarks.zoo.peer import halved, halved_by
from widthkit.export.dense import export
from widthkit.graph import ChannelGraph
from widthkit.graph.plan import apply_plan, make_plan
from widthkit.modules.clone import meta_clone
from widthkit.trace import trace
from widthkit.trace.context import flat_tensors
from widthkit.trace.inputs import Inputs, likely_inputs
from widthkit.trace.recorder import to_device

_OBVIOUS = ("size 1", "not a floating-point tensor", "size of a convolution kernel")
_FILL_LIMIT = 1.2e8
"""Above this many parameters the full model keeps untouched memory and is handled on the meta device alone."""
_ATTENDING = ("scaled_dot_product_attention", "matmul", "bmm", "baddbmm", "einsum")
"""Matrix products of activations: what holds one is no pure CNN."""
Row = dict[str, Any]


def measure(name: str, peer: str | None = None, seed: int = 0) -> Iterator[Row]:
    """Measure one model; what is known so far comes after every stage, so that a killed run leaves its part.

    Args:
        name: As for :func:`widthkit.create_model`.
        peer: Also let this library halve the model.
        seed: Of the random widths and permutations.
    """
    row: Row = {"model": name, "stage": "build"}
    yield row
    start = time.perf_counter()
    model = builder.build(name)
    n_params = checks.n_params(model)
    if n_params < _FILL_LIMIT:
        builder.fill(model)
    row |= {"params": n_params, "build_seconds": time.perf_counter() - start, "stage": "trace"}
    yield row
    start, cpu = time.perf_counter(), time.process_time()
    graph = trace(model)
    row |= {"trace_seconds": time.perf_counter() - start, "trace_cpu_seconds": time.process_time() - cpu}
    row |= _described(graph)
    row["attention"] = any(t.operator in _ATTENDING for t in graph.cost.macs_polynomial.terms)
    row["stage"] = "shrink"
    yield row
    row["oracles"] = {}
    full = _full_checks(model, graph, np.random.default_rng(seed), row["oracles"])
    row["stage"] = "small"
    yield row
    row["stage"] = "oracles"
    tiny = builder.small(name)
    row["small"] = {"input": _shapes(tiny.inputs), "how": tiny.how}
    small_graph = graph if tiny.full else trace(tiny.model, tiny.inputs)
    for _ in _numeric_checks(tiny, small_graph, np.random.default_rng(seed + 1), row["oracles"]):
        row["peak_memory_mb"] = peak_memory_mb()
        yield row
    row["peak_memory_mb"] = peak_memory_mb()
    if peer is not None and n_params < _FILL_LIMIT:
        del tiny, small_graph
        example = full if full is not None else next(likely_inputs(model))
        row["peer"] = {"peer": peer} | halved(model, example, graph, row["trace_cpu_seconds"])
        row["stage"] = "peer"
        yield row
        row["peer"] = row["peer"] | halved_by(peer, model, example)
    row["stage"] = "done"
    yield row


def _described(graph: ChannelGraph) -> Row:
    """Say what a graph holds; reasons are counted without module names and numbers."""
    reasons = Counter(
        re.sub(r"\d+", "#", re.sub(r"^(\d+ of \d+ positions: )?[\w.]+: ", "", why))
        for why in graph.frozen.values()
        if why not in _OBVIOUS and not why.startswith("model output")
    )
    return {
        "groups": len(graph.group_names),
        "units": int(graph.group_widths.sum()),
        "macs": graph.macs(),
        "searchable_macs_share": graph.cost.searchable_share(graph.vector()),
        "frozen": dict(reasons.most_common(8)),
        "notes": list(graph.notes),
    }


def _full_checks(model: nn.Module, graph: ChannelGraph, rng: np.random.Generator, oracles: Row) -> Inputs | None:
    """Shrink the full model to random widths and run it without arithmetic: shapes, parameters and MACs, exactly.

    Returns:
        The inputs that it was run on.
    """
    units = checks.random_units(graph, rng)
    widths = {n: len(u) for n, u in units.items()}
    try:
        inputs = next((i for i in likely_inputs(model) if builder.runs(model, i)), None)
        run, whole, hollow = checks.outputs, meta_clone(model), False
        placed = to_device(inputs, "meta")
    except builder.ValuesNeeded:
        inputs = next((i for i in likely_inputs(model) if builder.runs_hollow(model, i)), None)
        run, whole, hollow = checks.hollow_outputs, model, True
        placed = inputs
    if inputs is None:
        oracles["shrink"] = "no example input was found"
        return None
    slim = apply_plan(whole, make_plan(graph, units))

    def shrink() -> None:
        expected = [torch.zeros(t.shape) for t in run(whole, placed)]
        checks.same([torch.zeros(t.shape) for t in run(slim, placed)], expected)
        if graph.params(widths) != checks.n_params(slim):
            raise CheckError(f"{graph.params(widths)} parameters foretold, {checks.n_params(slim)} counted")

    _note(oracles, "shrink", shrink)
    _note(oracles, "macs", lambda: _equal_macs(graph, widths, checks.counted_macs(slim, placed, hollow)))
    return inputs


def _numeric_checks(tiny: builder.Small, graph: ChannelGraph, rng: np.random.Generator, oracles: Row) -> Iterator[None]:
    """Run the three oracles and fvcore on the small version."""
    model, inputs = tiny.model, tiny.inputs
    if not graph.group_names:
        oracles |= dict.fromkeys(("permutation", "same_net"), "no groups")
        return
    units = checks.random_units(graph, rng)
    expected = checks.outputs(model, inputs)

    def permutation() -> None:
        checks.same(checks.outputs(checks.permuted(model, graph, rng), inputs), expected, tiny.tolerance)

    def fvcore() -> None:
        slim = export(model, units, graph=graph)
        _equal_macs(graph, {n: len(u) for n, u in units.items()}, checks.fvcore_macs(slim, inputs))

    _note(oracles, "permutation", permutation)
    yield
    _note(oracles, "same_net", lambda: checks.check_same_net(model, graph, inputs, rng, tiny.tolerance))
    yield
    reason = cut.why_not(model, inputs)
    if reason:
        oracles["cut"] = f"n/a: {reason}"
    else:
        _note(oracles, "cut", lambda: cut.check_cut(model, graph, inputs, units, tiny.tolerance))
    yield
    if tiny.full:
        oracles["fvcore"] = "n/a: how much is computed depends on values"
    else:
        _note(oracles, "fvcore", fvcore)


def _equal_macs(graph: ChannelGraph, widths: dict[str, int], counted: int) -> None:
    own = graph.macs(widths) * graph.cost.macs_polynomial.divisor
    if own != counted:
        raise CheckError(f"{own} MACs foretold, {counted} counted")


def _note(oracles: Row, name: str, check: Callable[[], None]) -> None:
    """Record "pass" or what went wrong."""
    try:
        check()
        oracles[name] = "pass"
    except MemoryError:
        raise
    except CheckError as error:
        oracles[name] = str(error)
    except Exception as error:
        oracles[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _shapes(inputs: Inputs) -> list[list[int]]:
    return [list(t.shape) for t in flat_tensors(inputs)]


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, the imported libraries included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
