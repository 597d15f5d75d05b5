"""Latency: grammar, kernels, curves, cache and correction, on a clock that follows a formula. Nothing here is timed."""

from __future__ import annotations

import itertools
import json
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from widthkit.budget import parse_budget
from widthkit.errors import BudgetError
from widthkit.graph.plan import apply_plan, make_plan
from widthkit.graph.space import uniform_space
from widthkit.latency import Conditions, LatencyModel, read_conditions
from widthkit.latency.cache import Cache, cache_dir
from widthkit.latency.curves import Curve, sizes_to_measure
from widthkit.latency.kernels import kernel_uses
from widthkit.latency.measure import copy_seconds, kernel_seconds, network_seconds
from widthkit.latency.model import Correction, spread_widths
from widthkit.latency.tables import Clocks, measured_curves
from widthkit.search.measured import describe_rows, remarks
from widthkit.trace import trace

CPU = Conditions(device="cpu")


class Block(nn.Module):
    """Dense, depthwise and grouped convolutions, a norm, a gate, a residual and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.deep, self.point = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 48, 1)
        self.back, self.head = nn.Conv2d(48, 32, 1), nn.Linear(32, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu_()
        x = x + self.back(nn.functional.silu(self.point(self.deep(x)), inplace=True))
        return self.head(x.mean((2, 3)))


@cache
def graph():
    return trace(Block(), (1, 3, 8, 8))


def seconds_of(kernel, sizes):
    """A made-up clock: microseconds, with steps of 16 in contractions and a slow path beside them."""
    blocks = [-(-s // 16) * 16 for s in sizes]
    if kernel.contracts:
        return 1e-6 * (1 + 0.1 * np.prod(blocks) + 0.2 * sum(s for s in sizes if s % 16))
    return 1e-6 * (0.5 + 0.05 * sum(sizes))


class Clock:
    def __init__(self):
        self.asked = []

    def __call__(self, kernel, sizes, conditions):
        self.asked.append((kernel.key, tuple(sizes)))
        return seconds_of(kernel, sizes)


def whole(widths, conditions=CPU):
    """What the made-up clock says of a network: operators cost 1.5 times as much as alone, and 50 us are lost."""
    uses = kernel_uses(graph().program, conditions)
    return 5e-5 + 1.5 * sum(u.count * seconds_of(u.kernel, u.sizes(graph().vector(widths)).tolist()) for u in uses)


def model(tmp_path, clock=None, build=dict):
    clock = clock or Clock()

    def measure(networks, program, conditions, repeats=9):
        return {name: whole(widths, conditions) for name, widths in networks.items()}

    clocks = Clocks(clock, clock, say=lambda line: None)
    return LatencyModel(graph(), CPU, build, cache=Cache("cpu", tmp_path), measure=measure, clocks=clocks)


# --- grammar ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "conditions"),
    [
        ("cpu", CPU),
        ("CPU, batch=8", Conditions("cpu", 8)),
        ("cuda:1,batch=8,channels_last,bf16", Conditions("cuda:1", 8, "bfloat16", True)),
        ("fp16,contiguous", Conditions(None, 1, "float16", False)),
        ("batch=3", Conditions(batch=3)),
    ],
)
def test_conditions_that_can_be_read(words, conditions):
    assert read_conditions(words.split(","), "1ms") == conditions
    assert read_conditions(str(conditions).split(","), "1ms") == conditions


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("", "neither a device"),
        ("tpu9000", "neither a device"),
        ("meta", "neither a device"),
        ("batch=0", "no batch size"),
        ("batch=1.5", "no batch size"),
        ("batch=", "no batch size"),
        ("batch", "neither a device"),
        ("cpu,cuda:0", "names its device twice"),
        ("fp16,bf16", "names its type twice"),
        ("int8", "neither a device"),
        ("cpu,,", "neither a device"),
    ],
)
def test_conditions_that_cannot(words, why):
    with pytest.raises(BudgetError, match=why) as caught:
        read_conditions(words.split(","), f"1ms@{words}")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_a_device_that_is_not_here_is_refused_before_anything_is_measured():
    with pytest.raises(BudgetError, match=r"device 'cuda:0' cannot be used here: .* such as 1\.8ms@cpu") as caught:
        parse_budget("0.5x,1.8ms@cuda:0", graph())
    assert "\n" not in str(caught.value)


# --- kernels ----------------------------------------------------------------------------------------------------------


def test_kernels_say_which_sizes_are_open():
    found = {u.kernel.label: u for u in kernel_uses(graph().program, Conditions(batch=2))}
    assert found["conv2d(2x3x8x8, n0x3x3x3, n0)"].count == 1
    deep = found["conv2d(2xn0x8x8, n0x1x3x3, n0)"]
    point = found["conv2d(2xn0x8x8, n1xn0x1x1, n1)"]
    assert deep.kernel.n_sizes == 1
    assert point.kernel.n_sizes == 2
    widths = graph().vector({"stem": 7, "point": 9})
    assert deep.sizes(widths).tolist() == [7]
    pairs = [u.sizes(widths).tolist() for u in kernel_uses(graph().program, CPU) if u.kernel.key == _point_key()]
    assert sorted(pairs) == [[7, 9], [9, 7]]  # one kernel, used both ways
    assert not any("view" in label for label in found)


def _point_key():
    return next(u.kernel.key for u in kernel_uses(graph().program, CPU) if u.kernel.label.endswith("n1xn0x1x1, n1)"))


def test_kernels_do_not_know_the_model():
    """The same layer in another network, under another name and of another width, is the same kernel."""
    other = trace(nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 4, 1)), (1, 3, 8, 8))
    stem = next(u for u in kernel_uses(other.program, CPU) if "3x3x3" in u.kernel.label)
    assert stem.kernel.key in {u.kernel.key for u in kernel_uses(graph().program, CPU)}
    assert stem.kernel.key not in {u.kernel.key for u in kernel_uses(graph().program, Conditions(dtype="bfloat16"))}


@pytest.mark.parametrize("at", [CPU, Conditions("cpu", 2, "bfloat16", True)], ids=str)
def test_every_kernel_runs_alone_at_any_width(at):
    """The real clock takes every kernel of the network; what it says is only asked to be a time."""
    for use in kernel_uses(graph().program, at):
        sizes = use.sizes(graph().vector({"stem": 5, "point": 3})).tolist()
        assert 0 < kernel_seconds(use.kernel, sizes, at) < 60
    assert 0 < copy_seconds(use.kernel, sizes, at) < 60


# --- curves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [(), (1,), (7,), (64,), (64, 512), (3, 3), (40, 8, 8, 100)])
def test_designs_stay_inside_and_reach_the_end(largest):
    points = sizes_to_measure(largest)
    assert len(set(points)) == len(points)
    for point in points:
        assert all(1 <= p <= most for p, most in zip(point, largest, strict=True))
    assert tuple(largest) in points


@pytest.mark.parametrize("contracts", [True, False])
@pytest.mark.parametrize("n", [1, 2])
def test_curves_follow_steps_and_slow_paths_between_the_points(contracts, n):
    class Kernel:
        pass

    kernel = Kernel()
    kernel.contracts = contracts
    largest = (256, 192)[:n]
    curve = Curve.of({p: seconds_of(kernel, p) for p in sizes_to_measure(largest)}, contracts)
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = [int(rng.integers(1, most + 1)) for most in largest]
        assert curve.at(np.array([sizes]))[0] == pytest.approx(seconds_of(kernel, sizes), rel=0.02)


def test_what_no_formula_says_is_interpolated_smoothly():
    """A bump around 64 is followed there and forgotten far away."""
    line = {(c,): 1e-6 * c for c in (16, 32, 64, 128, 256, 512)}
    bumped = Curve.of({**line, (64,): 1.3e-6 * 64}, False)
    plain = Curve.of(line, False)
    ratio = [bumped.at(np.array([[c]]))[0] / plain.at(np.array([[c]]))[0] for c in (64, 512)]
    assert ratio[0] > 1.12
    assert abs(ratio[1] - 1) < 0.05


# --- cache ------------------------------------------------------------------------------------------------------------


def test_a_device_is_measured_once(tmp_path):
    first, second = Clock(), Clock()
    before = model(tmp_path, first).predict_ms()
    assert first.asked
    assert model(tmp_path, second).predict_ms() == before
    assert not second.asked


def test_wider_networks_measure_only_what_is_missing(tmp_path):
    clock = Clock()
    latency = model(tmp_path, clock)
    latency.predict_ms()
    seen = set(clock.asked)
    clock.asked.clear()
    latency.predict_ms({"stem": 64})  # a supernet that grows
    assert clock.asked
    assert not seen & set(clock.asked)


def test_a_damaged_cache_is_measured_anew(tmp_path):
    latency = model(tmp_path)
    expected = latency.predict_ms()
    for damage in ("{", "[]", '{"format": 1, "kernels": {"a": {"points": 3}}, "networks": {}}'):
        latency.cache.path.write_text(damage)
        clock = Clock()
        assert model(tmp_path, clock).predict_ms() == expected
        assert clock.asked


def test_two_processes_do_not_lose_each_others_measurements(tmp_path):
    a, b = Cache("cpu", tmp_path), Cache("cpu", tmp_path)
    a.add("k1", {(1,): 0.5}, copied=False)
    a.save()
    b.add("k2", {(2,): 0.25}, copied=True)
    b.save()
    again = Cache("cpu", tmp_path)
    assert (again.table("k1"), again.table("k2"), again.copied("k2")) == ({(1,): 0.5}, {(2,): 0.25}, True)


def test_the_cache_folder_can_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WIDTHKIT_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    assert Cache("cpu").path.is_relative_to(tmp_path / "mine")


def test_other_threads_are_another_device(tmp_path):
    before = Cache("cpu", tmp_path).path
    torch.set_num_threads(torch.get_num_threads() + 1)
    assert Cache("cpu", tmp_path).path != before
    assert json.dumps(Cache("cpu", tmp_path).device)


def test_an_operator_that_cannot_run_alone_is_timed_as_a_copy(tmp_path):
    def broken(kernel, sizes, conditions):
        if kernel.base == "mean":
            raise RuntimeError("shape is invalid")
        return seconds_of(kernel, sizes)

    known = Cache("cpu", tmp_path)
    uses = kernel_uses(graph().program, CPU)
    said = []
    found = measured_curves(uses, graph().vector(), CPU, known, Clocks(broken, lambda k, s, c: 7e-6, said.append))
    mean = next(u for u in uses if u.kernel.base == "mean")
    assert found[mean.kernel.key].at(np.array([[20]]))[0] == pytest.approx(7e-6)
    assert known.copied(mean.kernel.key)
    assert any("mean" in line and "shape is invalid" in line for line in said)


# --- networks ---------------------------------------------------------------------------------------------------------


def test_the_correction_finds_what_operators_do_not_show(tmp_path):
    latency = model(tmp_path)
    rng = np.random.default_rng(3)
    for _ in range(50):
        widths = {name: int(rng.integers(1, w + 1)) for name, w in graph().full.items()}
        assert latency.predict_ms(widths) == pytest.approx(1000 * whole(widths), rel=0.02)
    assert latency.correction.error < 0.02


def test_without_networks_the_sum_of_operators_stands(tmp_path):
    latency = model(tmp_path, build=None)
    assert latency.correction.error is None
    assert latency.correction.factors == (1.0, 1.0, 0.0)
    model(tmp_path).predict_ms()  # measures networks
    assert model(tmp_path, build=None).correction.error is not None


def test_one_network_does_not_bend_the_correction():
    sums = np.array([[1e-3, 1e-4, 4e6]])
    found = Correction.fit(sums, np.array([1.1e-3]), 0.0)
    assert found(sums)[0] == pytest.approx(1.1e-3, rel=0.01)
    assert found.factors[0] == pytest.approx(1.0, abs=0.05)


def test_many_vectors_at_once_are_the_single_ones(tmp_path):
    latency = model(tmp_path)
    many = spread_widths(graph(), 40)
    assert latency.predict_ms(many).tolist() == pytest.approx([latency.predict_ms(w) for w in many], rel=1e-12)
    assert latency.predict_ms(graph().vector(many).reshape(8, 5, -1)).shape == (8, 5)
    curves = measured_curves(latency.uses, graph().group_widths, CPU, latency.cache, Clocks())
    by_hand = [sum(u.count * curves[u.kernel.key].at(u.sizes(graph().vector(w))) for u in latency.uses) for w in many]
    assert latency.sums(graph().vector(many))[:, :2].sum(axis=1).tolist() == pytest.approx(by_hand)


def test_whole_networks_are_measured_as_they_are_deployed():
    """Type, memory format and batch size reach the network; all get the same input."""
    seen = []

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            last = x.is_contiguous(memory_format=torch.channels_last)
            seen.append((tuple(x.shape), x.dtype, last, self.conv.weight.dtype, self.training))
            return self.conv(x)

    at = Conditions("cpu", 3, "bfloat16", True)
    found = network_seconds({"a": Probe(), "b": Probe()}, graph().program, at, repeats=1)
    assert set(found) == {"a", "b"}
    assert set(seen) == {((3, 3, 8, 8), torch.bfloat16, True, torch.bfloat16, False)}


def test_a_network_that_does_not_run_there_is_one_clear_line(tmp_path):
    def fails(*_):
        raise RuntimeError("not implemented for\n'Half'")

    latency = LatencyModel(graph(), CPU, dict, cache=Cache("cpu", tmp_path), measure=fails)
    with pytest.raises(BudgetError, match=r"does not run under cpu .*another batch size, type") as caught:
        latency.measure_ms({})
    assert "\n" not in str(caught.value)


# --- budgets ----------------------------------------------------------------------------------------------------------


def budget_of(tmp_path, text):
    """A budget whose latency comes from the made-up clock."""
    import dataclasses

    budget = parse_budget(text, graph())
    latency = model(tmp_path)
    return dataclasses.replace(
        budget,
        limits=tuple(dataclasses.replace(m, latency=latency) if m.kind == "latency" else m for m in budget.limits),
    )


def test_several_kinds_hold_together(tmp_path):
    full = model(tmp_path).predict_ms()
    budget = budget_of(tmp_path, f"0.6x,40kB@batch=2,{0.7 * full:.6f}ms@cpu,batch=1")
    assert [m.kind for m in budget.limits] == ["macs", "memory", "latency"]
    space = uniform_space(graph(), 6)
    points = [space.decode(genes) for genes in itertools.product(*(range(len(g.options)) for g in space.groups))]
    usage = budget.usage(graph(), points)
    for widths, used in zip(points, usage, strict=True):
        holds = [
            graph().macs(widths) <= int(0.6 * graph().macs()),
            graph().memory(widths, batch=2) <= 40_000,
            model(tmp_path).predict_ms(widths) <= float(f"{0.7 * full:.6f}"),
        ]
        assert budget.fits(graph(), widths) == all(holds) == (used <= 1)
    assert len({budget.costs(graph(), w).argmax() for w in points}) > 1


@pytest.mark.parametrize("name", ["greedy", "random", "uniform", "evolution"])
@pytest.mark.parametrize("kind", ["latency", "memory", "all"])
def test_every_searcher_keeps_every_kind(tmp_path, name, kind):
    from widthkit.search import SEARCHERS
    from widthkit.testing.searchers import play, smooth_score

    full = model(tmp_path).predict_ms()
    texts = {"latency": f"{0.8 * full:.6f}ms", "memory": f"{0.8 * graph().memory():.0f}B"}
    budget = budget_of(tmp_path, texts[kind] if kind != "all" else ",".join(["0.8x", *texts.values()]))
    space = uniform_space(graph(), 8)
    budget.check(space)
    options = {"random": {"n": 10}, "evolution": {"population": 6, "generations": 3}}.get(name, {})
    searcher = SEARCHERS.get(name)(space, budget, np.random.default_rng(0), **options)
    asked = [w for round_, _ in play(searcher, smooth_score) for w in round_]
    inside = [w for w in asked if budget.fits(graph(), w)]
    assert inside
    assert name in ("greedy",) or len(inside) == len(asked)


def test_the_narrowest_network_is_named_with_all_it_costs(tmp_path):
    with pytest.raises(BudgetError, match=r"narrowest network .* MACs, .* params, .* kB, 0\.\d+ ms\)"):
        budget_of(tmp_path, "1MB,0.001ms").check(uniform_space(graph(), 4))


def test_remarks_name_missed_bounds_and_macs_without_speed():
    row = {"kind": "latency", "budget": "2ms@cpu", "bound": 2.0, "predicted": 1.9, "measured": 2.2, "dense": 2.1}
    said = remarks([row], 10**6, 2 * 10**6)
    assert "10.0% above the budget 2ms@cpu (predicted 1.9 ms)" in said[0]
    assert "has 1.00M MACs instead of 2.00M but is not faster under 2ms@cpu" in said[1]
    assert remarks([{**row, "measured": 1.0}], 10**6, 2 * 10**6) == []
    said = remarks([{**row, "measured": 1.0, "dense_predicted": 1.8}], 10**6, 2 * 10**6)
    assert "the model itself takes 2.1 ms now and 1.8 ms by the tables" in said[0]
    assert describe_rows([row]) == [
        "latency 2.2 ms measured, 1.9 ms predicted (budget 2ms@cpu, 0.95x as fast as the model)"
    ]


def test_networks_for_the_correction_are_the_models_own(tmp_path):
    """Built from the plan, run under the clock's conditions: the real path, once."""
    dense = Block().eval()
    latency = LatencyModel(
        graph(),
        CPU,
        lambda widths: apply_plan(dense, make_plan(graph(), widths)),
        cache=Cache("cpu", tmp_path),
        clocks=Clocks(Clock(), Clock(), say=lambda line: None),
    )
    assert latency.predict_ms() > 0
    assert len(latency.cache.networks(latency.key)) == 10
