"""One model of the zoo: everything that is measured about it."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.oracles import (
    OracleError,
    check_cut,
    check_equal,
    check_macs,
    check_params,
    check_permutation,
    check_same_net,
    counted_macs,
    fake_outputs,
    fvcore_macs,
    n_params,
    outputs,
    random_units,
    supernet_of,
    why_not,
    widths_of,
)
from benchmarks.zoo.build import ValuesNeededError, build, fill, runs, runs_with_fake_values
from benchmarks.zoo.peer import halved, halved_by
from benchmarks.zoo.smaller import Small, small
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
"""Above this many parameters the full model keeps untouched memory and runs on the meta device alone."""
_ATTENDING = ("scaled_dot_product_attention", "matmul", "bmm", "baddbmm", "einsum")
"""Matrix products of activations; a model with one of them is no pure CNN."""
_LEAST_SHARE = 0.25
"""Random widths keep at least this share of every group."""
Row = dict[str, Any]


def measure(name: str, peer: str | None = None, seed: int = 0) -> Iterator[Row]:
    """Measure one model; yield what is known after every stage, so that a killed process leaves its part.

    Args:
        name: As for :func:`widthkit.create_model`.
        peer: Also let this library halve the model.
        seed: Of the random widths and permutations.
    """
    row: Row = {"model": name, "stage": "build"}
    yield row
    start = time.perf_counter()
    model = build(name)
    if n_params(model) < _FILL_LIMIT:
        fill(model)
    row |= {"params": n_params(model), "build_seconds": time.perf_counter() - start, "stage": "trace"}
    yield row
    start, cpu = time.perf_counter(), time.process_time()
    graph = trace(model)
    row |= {"trace_seconds": time.perf_counter() - start, "trace_cpu_seconds": time.process_time() - cpu}
    row |= _described(graph)
    row["attention"] = any(t.operator in _ATTENDING for t in graph.cost.macs_polynomial.terms)
    row["stage"] = "shrink"
    yield row
    row["oracles"] = {}
    inputs = _full_checks(model, graph, np.random.default_rng(seed), row["oracles"])
    row["stage"] = "small"
    yield row
    row["stage"] = "oracles"
    tiny = small(name)
    row["small"] = {"input": [list(t.shape) for t in flat_tensors(tiny.inputs)], "how": tiny.how}
    small_graph = graph if tiny.full else trace(tiny.model, tiny.inputs)
    for _ in _numeric_checks(tiny, small_graph, np.random.default_rng(seed + 1), row["oracles"]):
        row["peak_memory_mb"] = peak_memory_mb()
        yield row
    row["peak_memory_mb"] = peak_memory_mb()
    if peer is not None and n_params(model) < _FILL_LIMIT:
        del tiny, small_graph
        example = inputs if inputs is not None else next(likely_inputs(model))
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
    """Shrink the full model to random widths and run it without arithmetic: exact shapes, parameters and MACs.

    Returns:
        The inputs that it ran on, or ``None`` if none were found.
    """
    units = random_units(graph, rng, _LEAST_SHARE)
    widths = widths_of(units)
    try:
        inputs = next((i for i in likely_inputs(model) if runs(model, i)), None)
        run, whole, placed, fake_values = outputs, meta_clone(model), to_device(inputs, "meta"), False
    except ValuesNeededError:
        inputs = next((i for i in likely_inputs(model) if runs_with_fake_values(model, i)), None)
        run, whole, placed, fake_values = fake_outputs, model, inputs, True
    if inputs is None:
        oracles["shrink"] = "no example input was found"
        return None
    slim = apply_plan(whole, make_plan(graph, units))

    def shrink() -> None:
        expected = [torch.zeros(t.shape) for t in run(whole, placed)]
        check_equal([torch.zeros(t.shape) for t in run(slim, placed)], expected)
        check_params(graph, widths, slim)

    _note(oracles, "shrink", shrink)
    _note(oracles, "macs", lambda: check_macs(graph, widths, counted_macs(slim, placed, fake_values)))
    return inputs


def _numeric_checks(tiny: Small, graph: ChannelGraph, rng: np.random.Generator, oracles: Row) -> Iterator[None]:
    """Run the oracles of values, and count MACs by fvcore, on the small version."""
    model, inputs, tolerance = tiny.model, tiny.inputs, tiny.tolerance
    if not graph.group_names:
        oracles |= dict.fromkeys(("permutation", "same_net"), "no groups")
        return
    units = random_units(graph, rng, _LEAST_SHARE)
    _note(oracles, "permutation", lambda: check_permutation(model, graph, inputs, rng, tolerance=tolerance))
    yield

    def same_net() -> None:
        net = supernet_of(model, graph, "ua")
        check_same_net(net, inputs, net.space.sample(rng), tolerance)

    def fvcore() -> None:
        check_macs(graph, widths_of(units), fvcore_macs(export(model, units, graph=graph), inputs))

    _note(oracles, "same_net", same_net)
    yield
    reason = why_not(model, inputs)
    if reason:
        oracles["cut"] = f"n/a: {reason}"
    else:
        _note(oracles, "cut", partial(check_cut, model, graph, inputs, units, tolerance))
    yield
    if tiny.full:
        oracles["fvcore"] = "n/a: how much is computed depends on values"
    else:
        _note(oracles, "fvcore", fvcore)


def _note(oracles: Row, name: str, check: Callable[[], None]) -> None:
    """Record "pass" or what went wrong."""
    try:
        check()
        oracles[name] = "pass"
    except MemoryError:
        raise
    except OracleError as error:
        oracles[name] = str(error)[:200]
    except Exception as error:
        oracles[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def peak_memory_mb() -> float:
    """Return the largest resident size of this process so far, the imported libraries included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
