"""Every topology against its own declaration and against the oracles."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from topologies import CASES, Case, sites

from benchmarks import oracles
from widthkit.export.dense import export
from widthkit.trace import trace

all_cases = pytest.mark.parametrize("case", CASES, ids=str)


@functools.cache
def traced(case: Case):
    model = case.model()
    return model, trace(model, case.shape), case.inputs()


def seeded(case: Case) -> np.random.Generator:
    return np.random.default_rng(sum(case.name.encode()))


@all_cases
def test_groups_are_the_declared_ones(case):
    model, graph, _ = traced(case)
    found = {n: (g.width, {(s.tensor, s.dim) for s in g.sites}) for n, g in graph.groups.items()}
    assert found == {name: (width, sites(model, text)) for name, (width, text) in case.groups.items()}


@all_cases
def test_frozen_is_the_declared_and_says_why(case):
    model, graph, _ = traced(case)
    free = {(s.tensor, s.dim) for g in graph.groups.values() for s in g.sites}
    dims = {(t.name, d) for t in graph.tensors.values() for d, n in enumerate(t.shape) if n > 1 and d < 2}
    assert dims - free == sites(model, case.frozen)
    for tensor, dim in dims - free:
        assert graph.frozen[f"{tensor}[{dim}]"].strip()


@all_cases
def test_every_position_has_one_owner(case):
    _, graph, _ = traced(case)
    for group in graph.groups.values():
        for site in group.sites:
            assert len(site.index) == group.width
            assert len(np.unique(site.index)) == site.index.size


@all_cases
def test_permuting_a_group_changes_nothing(case):
    model, graph, x = traced(case)
    oracles.check_permutation(model, graph, x, seeded(case), each=True)


@pytest.mark.parametrize("case", [c for c in CASES if not c.cut], ids=str)
def test_cutting_what_consumers_read_is_exporting(case):
    model, graph, x = traced(case)
    rng = seeded(case)
    for _ in range(3):
        oracles.check_cut(model, graph, x, oracles.random_units(graph, rng))


@all_cases
def test_exported_net_is_the_supernet_at_its_widths(case):
    model, graph, x = traced(case)
    net = oracles.supernet_of(model, graph)
    oracles.check_equal(oracles.outputs(net, x), oracles.outputs(model, x))
    rng = seeded(case)
    for widths in [net.space.smallest, net.space.largest, *(net.space.sample(rng) for _ in range(3))]:
        oracles.check_same_net(net, x, widths)


@all_cases
def test_growing_keeps_what_was_there(case):
    model, graph, x = traced(case)
    oracles.check_growth(model, graph, x, seeded(case))


@pytest.mark.parametrize("case", [c for c in CASES if not c.uncounted], ids=str)
def test_cost_is_exact(case):
    model, graph, x = traced(case)
    rng = seeded(case)
    for units in (graph.full, dict.fromkeys(graph.full, 1), oracles.random_units(graph, rng)):
        oracles.check_cost(model, graph, x, units)


@all_cases
def test_single_units_run(case):
    model, graph, x = traced(case)
    slim = export(model, dict.fromkeys(graph.full, 1), graph=graph)
    assert [t.shape for t in oracles.outputs(slim, x)] == [t.shape for t in oracles.outputs(model, x)]
