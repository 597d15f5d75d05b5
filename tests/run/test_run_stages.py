"""Search in stages, with evolving bins and without: budgets, choices, maxima, warm starts, rankings, resume."""

import itertools
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import widthkit as wk
from widthkit.budget import parse_budget
from widthkit.errors import BudgetError, CheckpointError, OptionError
from widthkit.graph.plan import apply_plan
from widthkit.graph.resize import narrow
from widthkit.graph.space import bin_sizes, flops_bins, uniform_space
from widthkit.run.stage_plan import StagePlan
from widthkit.run.stages import next_supernet, run_stages, search_in_stages
from widthkit.supernet import make_supernet
from widthkit.supernet.ranking import unit_scores
from widthkit.testing import small_batch, small_graph, small_net
from widthkit.trace import trace

TRAIN = [small_batch(i) for i in range(4)]
VALID = [small_batch(20)]


def staged(model=None, budget="0.5x", **options):
    options.setdefault("min_width", 1)
    options.setdefault("training", {"lr": 0.01, "device": "cpu", "progress": False})
    options.setdefault("searching", {"progress": False})
    options.setdefault("graph", small_graph())
    options.setdefault("bins", 2.0 ** (options.get("stages", 3) - 1))
    return search_in_stages(model or small_net(), TRAIN, VALID, budget, epochs=1, **options)


# --- the graph of a narrower model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_narrowed_graph_is_the_one_that_tracing_finds(seed):
    """Independent: trace the exported network from nothing and compare shapes, sites and costs."""
    graph = small_graph()
    rng = np.random.default_rng(seed)
    widths = {name: int(rng.integers(2, width + 1)) for name, width in graph.full.items()}
    plan, small = narrow(graph, widths)
    traced = trace(apply_plan(small_net(), plan), torch.zeros(2, 3, 6, 6, dtype=torch.float64))
    assert small.full == traced.full == widths
    assert {n: i.shape for n, i in small.tensors.items()} == {n: i.shape for n, i in traced.tensors.items()}
    for name, group in traced.groups.items():
        found = {(s.tensor, s.dim): s.index.tolist() for s in small.groups[name].sites}
        assert found == {(s.tensor, s.dim): s.index.tolist() for s in group.sites}
    vectors = rng.integers(1, traced.group_widths + 1, size=(20, len(traced.group_widths)))
    assert (small.macs(vectors) == traced.macs(vectors)).all()
    assert (small.params(vectors) == traced.params(vectors)).all()
    assert (small.sensitivity() == traced.sensitivity()).all()


# --- the plan of the stages -------------------------------------------------------------------------------------------


def test_budgets_and_bins_follow_equation_10():
    graph = small_graph()
    plan = StagePlan(parse_budget("0.4x,200params", graph), stages=4, alpha=2.0, beta=8.0)
    first = flops_bins(graph, 8.0)
    for stage in (1, 2, 3, 4):
        macs, params = plan.budget_at(stage, first).limits
        assert macs.value == pytest.approx(graph.macs() - (graph.macs() - 0.4 * graph.macs()) * stage / 4, abs=1)
        assert params.value == pytest.approx(graph.params() - (graph.params() - 200) * stage / 4, abs=1)
        assert plan.beta_at(stage) == 8.0 / 2 ** (stage - 1)
    assert plan.budget_at(4, first) == plan.budget


@pytest.mark.parametrize("beta", [1.0, None])
def test_a_bound_that_the_full_network_holds_stays(beta):
    graph = small_graph()
    plan = StagePlan(parse_budget("0.5x,1Mparams", graph), stages=2, beta=beta)
    assert plan.budget_at(1, flops_bins(graph)).limits[1].value == 1_000_000


def test_the_line_starts_at_the_supernets_cost_where_it_is_wider_than_the_model():
    graph = small_graph()
    wide = flops_bins(graph, 1.0, max_width="1.5x")
    plan = StagePlan(parse_budget("1x", graph), stages=2, beta=2.0)
    full = graph.macs(wide.largest)
    assert plan.budget_at(1, wide).limits[0].value == pytest.approx((full + graph.macs()) / 2, abs=1)


@pytest.mark.parametrize("options", [{"stages": 0}, {"stages": True}, {"alpha": 0}, {"alpha": float("inf")}])
def test_plans_that_make_no_sense(options):
    with pytest.raises(OptionError):
        StagePlan(parse_budget("0.5x", small_graph()), **options)


def test_a_later_space_has_the_found_widths_as_maximum_and_keeps_the_limits():
    graph = small_graph()
    limits = {"min_width": "0.5x", "divisor": 2, "fixed": {"top.0": 5}}
    net = make_supernet(small_net(), "bc", graph=graph, bins=4.0, **limits)
    plan = StagePlan(parse_budget("0.5x", graph), 2, 2.0, 4.0, **limits)
    later = next_supernet(net, {"stem.0": 6, "expand.0": 10, "top.0": 5}, plan, 2)
    options = {g.name: g.options for g in later.space.groups}
    assert options["top.0"] == (5,)
    assert max(options["stem.0"]) == 6
    assert max(options["expand.0"]) == 10
    assert min(options["stem.0"]) >= 4  # half of the model's 8, not of the 6 found
    assert min(options["expand.0"]) >= 6
    assert all(o % 2 == 0 for name in ("stem.0", "expand.0") for o in options[name])
    sizes = bin_sizes(later.graph, 2.0)
    assert sizes.max() > 1


@pytest.mark.parametrize("strategy", ["bc", "ua", "bcv2"])
def test_a_later_supernet_computes_what_the_last_one_did(strategy):
    """The warm start: at the found widths, path 0 of the last supernet, to the last bit."""
    net = make_supernet(small_net(), strategy, graph=small_graph(), bins=4.0)
    wk.train(net, TRAIN, 1, lr=0.01, device="cpu", progress=False)
    widths = {"stem.0": 6, "expand.0": 9, "top.0": 4}
    plan = StagePlan(parse_budget("0.5x", net.graph), 2, 2.0, 4.0)
    later = next_supernet(net, widths, plan, 2)
    x = TRAIN[0][0]
    for mode in (True, False):
        before = net.train(mode).set_widths(widths)(x)
        after = later.train(mode).set_widths(widths)(x)
        torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


# --- iterative pruning: no bins ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_without_bins_budgets_fall_by_equal_ratios(stages):
    """Closed form: full * (target / full) ** (t / T), for every bound by itself; the last is the target itself."""
    graph = small_graph()
    plan = StagePlan(parse_budget("0.2x,150params", graph), stages)
    first = uniform_space(graph, 20)
    full, target = (graph.macs(), graph.params()), [limit.value for limit in plan.budget.limits]
    for stage in range(1, stages + 1):
        expected = [f * (t / f) ** (stage / stages) for f, t in zip(full, target, strict=True)]
        assert [limit.value for limit in plan.budget_at(stage, first).limits] == pytest.approx(expected, abs=1)
        assert plan.beta_at(stage) is None
    assert plan.budget_at(stages, first) == plan.budget


def test_without_bins_a_later_space_has_the_first_choices_that_are_left():
    graph = small_graph()
    net = make_supernet(small_net(), "whole", graph=graph, k=4, min_width=2, divisor=2, fixed={"top.0": 5})
    first = {g.name: g.options for g in net.space.groups}
    plan = StagePlan(parse_budget("0.5x", graph), 3, divisor=2)
    widths = {"stem.0": first["stem.0"][-2], "expand.0": first["expand.0"][1], "top.0": 5}
    second = next_supernet(net, widths, plan, 2)
    assert {g.name: g.options for g in second.space.groups} == {
        n: tuple(o for o in options if o <= widths[n]) for n, options in first.items()
    }
    assert {g.name: g.width for g in second.space.groups} == widths == second.graph.full
    narrowest = {**widths, "expand.0": first["expand.0"][0]}
    third = next_supernet(second, narrowest, plan, 3, net)
    assert third.space.groups[second.space.names.index("expand.0")].options == first["expand.0"][:1]
    # Costs are those of the same widths in the model as it was given.
    assert third.graph.macs() == graph.macs(narrowest)


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_units_are_ranked_anew_at_every_stage(criterion):
    """At the start of a stage the units of every group stand in the order of the weights that are left then."""
    seen = []

    def look(net):
        found = unit_scores(net.model, net.graph, criterion, data=TRAIN)
        seen.append([np.diff(values).max(initial=-1.0) <= 1e-6 for values in found.values()])

    graph = small_graph()
    options = {"graph": graph, "k": 6, "rank": criterion, "rank_data": TRAIN}
    net = make_supernet(small_net(), "whole", **options)
    plan = StagePlan(parse_budget("0.3x", graph), 3)

    def train_stage(net, stage):
        look(net)
        wk.train(net, TRAIN, 3, lr=0.1, device="cpu", progress=False)

    def search_stage(net, budget, stage):
        return wk.search(net, VALID, budget, "importance", criterion=criterion, progress=False)

    rank = partial(unit_scores, criterion=criterion, data=TRAIN)
    run_stages(net, plan, train_stage, search_stage, rank)
    assert seen == [[True] * 3] * 3
    seen.clear()
    net = make_supernet(small_net(), "whole", **options)
    run_stages(net, plan, train_stage, search_stage)
    assert seen[0] == [True] * 3
    assert not all(seen[1]) or not all(seen[2])  # training changes the order, and nobody ranks


@pytest.mark.parametrize(("strategy", "searcher"), [("whole", "greedy"), ("sparse", "importance"), ("ua", "random")])
def test_iterative_pruning_works_with_any_strategy_and_searcher(strategy, searcher):
    graph = small_graph()
    found = staged(
        budget="0.3x",
        stages=3,
        bins=None,
        k=12,
        strategy=strategy,
        searcher=searcher,
        rank="magnitude",
        searching={"progress": False, **({"n": 4} if searcher == "random" else {})},
    )
    rows = found.result.settings["stages"]
    for number, row in enumerate(rows, start=1):
        assert row["macs"] <= graph.macs() * 0.3 ** (number / 3)
        assert row["macs"] == graph.macs(row["widths"])
    for last, now in itertools.pairwise(rows):
        assert all(now["widths"][name] <= width for name, width in last["widths"].items())
    slim = wk.export(found.net, found.result.widths)
    assert sum(p.numel() for p in slim.parameters()) == found.result.params == graph.params(found.result.widths)


def test_a_trained_model_is_cut_before_it_is_trained_again():
    """With first_epochs=0 the first widths are those of a search on the model itself; with epochs=0 nothing trains."""
    options = {"budget": "0.3x", "stages": 2, "bins": None, "k": 12, "strategy": "whole", "rank": "magnitude"}
    found = staged(**options, searcher="greedy", first_epochs=0)
    net = make_supernet(small_net(), "whole", graph=small_graph(), k=12, min_width=1, rank="magnitude")
    budget = StagePlan(parse_budget("0.3x", small_graph()), 2).budget_at(1, net.space)
    first = wk.search(net, VALID, budget, "greedy", progress=False)
    assert found.result.settings["stages"][0]["widths"] == first.widths
    plain = search_in_stages(
        small_net(), [], VALID, epochs=0, searcher="greedy", min_width=1, graph=small_graph(), **options
    )
    assert plain.result.settings["stages"][0]["widths"] == first.widths
    kept = dict(plain.net.model.named_parameters())["head.weight"]
    assert all(any(torch.equal(c, d) for d in small_net().head.weight.T) for c in kept.T)


def test_relative_targets_of_later_stages_mean_the_first_model():
    found = staged(budget="0.3x", stages=2, bins=None, strategy="sparse", growth=0.1, searcher="importance", k=12)
    assert found.net.graph.macs() < small_graph().macs()
    assert found.net.strategy.target == "0.3x"
    assert found.net.policy.budget == parse_budget("0.3x", small_graph())
    gates = staged(budget="0.3x", stages=2, bins=None, strategy="dbc")
    assert gates.net.policy.target == parse_budget("0.3x", small_graph())
    assert 0.25 * small_graph().macs() < gates.result.macs <= 0.3 * small_graph().macs()


def test_scores_of_units_are_refused_because_they_fit_one_stage():
    ones = {name: np.ones(width) for name, width in small_graph().full.items()}
    with pytest.raises(OptionError, match="name a criterion"):
        staged(stages=2, rank=ones)
    assert staged(stages=1, rank=ones).result.macs <= 0.5 * small_graph().macs()


# --- the whole search -------------------------------------------------------------------------------------------------


def test_a_search_in_stages_ends_inside_the_budget_with_widths_that_only_shrink(tmp_path):
    model = small_net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = staged(
        model, stages=3, searcher="evolution", searching={"population": 4, "generations": 2, "progress": False}
    )
    rows = found.result.settings["stages"]
    assert [row["beta"] for row in rows] == [4.0, 2.0, 1.0]
    assert [row["stage"] for row in rows] == [1, 2, 3]
    for last, now in itertools.pairwise(rows):
        assert all(now["widths"][name] <= width for name, width in last["widths"].items())
        assert now["macs"] <= last["macs"]
    graph = small_graph()
    assert 0.97 * 0.5 * graph.macs() < found.result.macs <= 0.5 * graph.macs()
    assert found.result.full == {"widths": graph.full, "macs": graph.macs(), "params": graph.params()}
    assert found.result.macs == graph.macs(found.result.widths)
    slim = wk.export(found.net, found.result.widths)
    assert sum(p.numel() for p in slim.parameters()) == found.result.params == graph.params(found.result.widths)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_stage_is_an_ordinary_search():
    found = staged(stages=1, bins=2.0, searcher="greedy")
    net = make_supernet(small_net(), "bc", graph=small_graph(), bins=2.0, min_width=1)
    wk.train(net, TRAIN, 1, lr=0.01, device="cpu", progress=False)
    plain = wk.search(net, VALID, "0.5x", "greedy", loss=F.cross_entropy, progress=False)
    assert found.result.trials == plain.trials
    assert found.result.widths == plain.widths


@pytest.mark.parametrize("form", [{"bins": 2.0}, {"bins": None, "rank": "magnitude", "strategy": "sparse"}], ids=str)
@pytest.mark.parametrize("n", [1, 5, 9])
def test_an_interrupted_search_in_stages_goes_on_to_the_same_result(n, form, tmp_path):
    left = []

    def stop(trial, progress):
        left.append(trial)
        if len(left) == n:
            raise KeyboardInterrupt

    run = partial(staged, stages=2, searcher="random", **form)
    quiet = {"n": 5, "progress": False}
    whole = run(out=tmp_path / "whole", searching=quiet)
    total = sum(row["networks"] for row in whole.result.settings["stages"])
    assert total >= 9 or n < 9
    interrupted = False
    try:
        run(out=tmp_path / "cut", searching={**quiet, "progress": stop})
    except KeyboardInterrupt:
        interrupted = True
    assert interrupted == (n <= total)
    again = run(out=tmp_path / "cut", resume=True, searching=quiet)
    assert again.result == whole.result
    assert (tmp_path / "cut" / "search.json").read_bytes() == (tmp_path / "whole" / "search.json").read_bytes()
    for a, b in zip(again.net.parameters(), whole.net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_stages_are_journaled_in_folders_of_their_own(tmp_path):
    staged(stages=2, out=tmp_path)
    for stage in (1, 2):
        assert (tmp_path / f"stage-{stage}" / "search-journal.jsonl").exists()
        assert (tmp_path / f"stage-{stage}" / "checkpoint.safetensors").exists()
    assert len(json.loads((tmp_path / "search.json").read_text())["settings"]["stages"]) == 2
    with pytest.raises(CheckpointError):
        staged(stages=2, out=tmp_path, resume=True, strategy="ua")


def test_a_budget_below_the_space_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(BudgetError):
        staged(budget="0.01x", stages=2, out=tmp_path / "none", min_width="0.5x")
    assert not (tmp_path / "none").exists()


def test_stages_are_called_in_order():
    net = make_supernet(small_net(), "bc", graph=small_graph(), bins=2.0)
    plan = StagePlan(parse_budget("0.5x", net.graph), 2, 2.0, 2.0)
    calls = []

    def search(net, budget, stage):
        calls.append(("search", stage, str(budget)))
        return wk.search(net, VALID, budget, "uniform", progress=False)

    found = run_stages(net, plan, lambda net, stage: calls.append(("train", stage)), search)
    assert [call[:2] for call in calls] == [("train", 1), ("search", 1), ("train", 2), ("search", 2)]
    assert calls[1][2].startswith("0.5x (stage 1 of 2: ")
    assert calls[3][2] == found.result.budget == "0.5x"


def test_a_stage_that_ends_too_small_leaves_room_for_the_next():
    """Were the small result the maximum, no network of the next stage could fill its budget."""
    graph = small_graph()
    net = make_supernet(small_net(), "bc", graph=graph, bins=1.0)
    plan = StagePlan(parse_budget("0.5x", graph), 2, 2.0, 1.0)
    maxima = []

    def search(net, budget, stage):
        maxima.append(net.graph.full)
        result = wk.search(net, VALID, budget, "random", n=6, progress=False)
        small = net.space.smallest
        least = replace(result.trials[0], widths=small, macs=graph.macs(small))
        return result if stage > 1 else replace(result, widths=small, macs=least.macs, trials=[*result.trials, least])

    found = run_stages(net, plan, lambda net, stage: None, search)
    assert graph.macs(maxima[1]) > 0.5 * graph.macs()
    assert found.result.settings["stages"][0]["widths"] == maxima[1]
    assert 0.97 * 0.5 * graph.macs() < found.result.macs <= 0.5 * graph.macs()
