"""Sparse training: the penalty against autograd on its formula, which units go, what training leaves of them."""

import numpy as np
import pytest
import torch
from widthkit_plugins.searchers.importance import prune
from widthkit_plugins.strategies.sparse.strategy import SparseTraining, penalty_of

import widthkit as wk
from benchmarks.nets import plain_cnn
from widthkit.budget import parse_budget
from widthkit.errors import ModelError, OptionError
from widthkit.modules.blocks import residual_separable
from widthkit.testing import StrategyConformance, make_step, small_batch, small_graph, small_net

TRAIN = [small_batch(i) for i in range(4)]


class TestSparseTraining(StrategyConformance):
    @pytest.fixture(params=[{}, {"growth": 0.1, "target": "0.7x"}, {"reg": 0.0}], ids=str)
    def strategy(self, request):
        return SparseTraining(**request.param)


def make(**options):
    return wk.make_supernet(small_net(), "sparse", graph=small_graph(), **options)


def squared_norms(net):
    """By the sites, unit by unit, differentiable: group name -> ``[units]``."""
    own = dict(net.model.named_parameters())
    found = {}
    for name, group in net.wide_graph.groups.items():
        sums = [
            torch.stack([own[s.tensor].index_select(s.dim, torch.from_numpy(row)).square().sum() for row in s.index])
            for s in group.sites
            if s.tensor in own
        ]
        found[name] = torch.stack(sums).sum(0)
    return found


# --- the penalty ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("growth", [0.0, 0.7])
def test_the_gradient_is_that_of_the_written_formula(growth):
    """Eq. 4 of DepGraph and the growing part, by autograd, the strengths held constant."""
    progress, options = 0.25, {"reg": 0.3, "alpha": 4.0, "growth": growth, "target": "0.6x"}
    nets = [make(**options), make(reg=0.0)]
    for net in nets:
        step = make_step()
        step.progress = progress
        net.train_step(step)
    ours, task = nets
    norms = squared_norms(ours)
    widths = prune(
        ours.space, parse_budget("0.6x", ours.graph), {n: (v / v.mean()).detach().numpy() for n, v in norms.items()}
    )
    assert widths != ours.graph.full
    total = 0.0
    for name, norm in norms.items():
        fixed = norm.detach()
        strength = 0.3 * 2 ** (4 * (fixed.max() - fixed) / (fixed.max() - fixed.min()))
        strength[fixed.argsort(descending=True)[widths[name] :]] += growth * progress
        total = total + (strength / 2 * norm).sum()
    expected = torch.autograd.grad(total, list(ours.model.parameters()), allow_unused=True)
    for a, b, penalty in zip(ours.model.parameters(), task.model.parameters(), expected, strict=True):
        penalty = torch.zeros_like(a) if penalty is None else penalty
        torch.testing.assert_close(a.grad - b.grad, penalty, rtol=1e-9, atol=1e-12)


def test_without_penalty_training_is_ordinary_training_to_the_last_bit():
    plain, net = small_net(), make(reg=0.0)
    for module in (plain, net):
        wk.train(module, TRAIN, 2, lr=0.05, device="cpu", progress=False)
    assert all(torch.equal(net.model.state_dict()[name], value) for name, value in plain.state_dict().items())


def test_the_loss_that_is_shown_is_the_tasks():
    assert make(reg=10.0).train_step(make_step()) == make(reg=0.0).train_step(make_step())


def test_groups_that_cannot_become_narrower_have_no_penalty():
    own = {"fixed": {"stem.0": 8}, "reg": 0.5}
    net, free = make(**own), make(reg=0.0, fixed={"stem.0": 8})
    for each in (net, free):
        each.train_step(make_step())
    a, b = net.model.get_parameter("stem.0.weight"), free.model.get_parameter("stem.0.weight")
    assert torch.equal(a.grad, b.grad)
    a, b = net.model.get_parameter("top.0.weight"), free.model.get_parameter("top.0.weight")
    assert not torch.equal(a.grad, b.grad)


def test_equal_units_are_pulled_alike():
    net = make(reg=0.5)
    with torch.no_grad():
        for parameter in net.model.parameters():
            parameter.fill_(0.1)
    norms = penalty_of(net).squared_norms(net.model)
    assert penalty_of(net).strengths(norms, 0.5, 4.0, 0.0).tolist() == [0.5] * len(norms)


# --- which units a width stands for -----------------------------------------------------------------------------------


def test_a_width_is_the_units_of_the_largest_norm_now():
    """After training, after a change by hand, and after loading: never those of earlier weights."""
    net = make(reg=1e-2)
    first = net.paths(net.space.smallest)
    wk.train(net, TRAIN, 2, lr=0.1, device="cpu", progress=False)
    state = {name: value.clone() for name, value in net.state_dict().items()}

    def expected(width):
        return {
            n: sorted(np.argsort(-v.detach().numpy(), kind="stable")[: width[n]].tolist())
            for n, v in squared_norms(net).items()
        }

    for width in (net.space.smallest, {n: w // 2 for n, w in net.graph.full.items()}):
        assert {n: u.tolist() for n, u in net.paths(width)[0].items()} == expected(width)
    before = net.paths({"top.0": 2})[0]["top.0"].tolist()
    with torch.no_grad():
        for site in net.graph.groups["top.0"].sites:
            if site.tensor in dict(net.model.named_parameters()):
                net.model.get_parameter(site.tensor).index_fill_(
                    site.dim, torch.from_numpy(site.index[before].reshape(-1)), 0.0
                )
    assert not set(net.paths({"top.0": 2})[0]["top.0"].tolist()) & set(before)
    net.load_state_dict(state)
    assert net.paths({"top.0": 2})[0]["top.0"].tolist() == before
    assert len(first) == 1


def test_the_importance_searcher_ranks_the_trained_weights():
    net = make(reg=0.1, k=12, min_width=1)
    untrained = wk.search(net, TRAIN[:1], "0.4x", "importance", progress=False).widths
    wk.train(net, TRAIN, 10, lr=0.1, device="cpu", progress=False)
    result = wk.search(net, TRAIN[:1], "0.4x", "importance", progress=False)
    twin = wk.make_supernet(net.model, "whole", graph=net.graph, space=net.space)
    assert result.widths == wk.search(twin, TRAIN[:1], "0.4x", "importance", progress=False).widths != untrained


# --- the units that go ------------------------------------------------------------------------------------------------


def digits_net(data, **options):
    torch.manual_seed(0)
    model = plain_cnn(num_classes=10)
    net = wk.make_supernet(model, "sparse", example_inputs=(1, 3, 16, 16), **options)
    loader = wk.make_loader(data.train, 64, train=True)
    history = wk.train(net, loader, 3, lr=0.05, device="cpu", progress=False).history
    # Judged by one measure, whatever the strategy chose in training.
    judge = SparseTraining(growth=1.0, target="0.4x").attach(net)
    judge.choose(net)
    return net, judge.going_norm(net.model), history


def test_training_makes_the_units_small_that_are_cut():
    data = wk.load_data("digits", image_size=16, limit=400)
    plain, reg, grown = (
        digits_net(data, **options)
        for options in ({"reg": 0.0}, {"reg": 0.05}, {"reg": 0.0, "growth": 1.0, "budget": "0.4x"})
    )
    assert reg[1] < 0.75 * plain[1]
    assert grown[1] < 0.5 * plain[1]
    figures = [entry["going_norm"] for entry in grown[2]]
    assert figures == sorted(figures, reverse=True)
    assert figures[-1] == pytest.approx(grown[1], rel=1e-6)


def test_the_runs_budget_is_the_target_and_relative_ones_mean_the_first_model():
    assert SparseTraining(growth=1.0).for_budget("0.3x").target == "0.3x"
    assert SparseTraining(target="0.6x").for_budget("0.3x").target == "0.6x"
    net = make(budget="0.3x", growth=1.0)
    assert net.strategy.target == "0.3x"
    assert penalty_of(net).budget == parse_budget("0.3x", net.graph)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"reg": -1.0}, {"alpha": float("nan")}, {"growth": float("inf")}, {"target": 0.5}])
def test_options_that_make_no_sense(options):
    (name,) = options
    with pytest.raises(OptionError, match=f"^{name}="):
        SparseTraining(**options)


def test_a_network_that_merges_is_refused():
    block = torch.nn.Sequential(residual_separable(8, 8, 1), torch.nn.Conv2d(8, 4, 1))
    with pytest.raises(ModelError, match="leave out merges=True"):
        wk.make_supernet(block, "sparse", merges=True, example_inputs=(1, 8, 6, 6))
