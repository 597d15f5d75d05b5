"""Binary gates against Pruning-as-Search: gradients, recovery, the MACs term, networks that come out of training."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from widthkit_plugins.strategies.dbc.policy import Policy
from widthkit_plugins.strategies.dbc.strategy import DepthwiseBinary

import widthkit as wk
from widthkit.budget import Budget, Limit
from widthkit.errors import BudgetError, CheckpointError, OptionError
from widthkit.search import SearchResult
from widthkit.testing import StrategyConformance, make_step, small_batch
from widthkit.testing.examples import small_graph, small_net
from widthkit.train.settings import TrainSettings


class TestDepthwiseBinary(StrategyConformance):
    @pytest.fixture(params=[{}, {"target": "0.7x", "beta": 0.0}], ids=str)
    def strategy(self, request):
        return DepthwiseBinary(**request.param)


def make(**options):
    return wk.make_supernet(small_net(), DepthwiseBinary(**options), graph=small_graph())


def close(net, group, *units):
    """Close the gates of some units."""
    with torch.no_grad():
        for unit in units:
            net.policy.gates[net.policy.ranges[group].start + unit] = 0.45


# --- gates ------------------------------------------------------------------------------------------------------------


def test_gates_are_binary_with_straight_through_gradients():
    # Eq. 2.
    policy = make().policy
    with torch.no_grad():
        policy.gates[:4] = torch.tensor([0.5, 0.51, -3.0, 7.0])
    bits = policy.bits()
    assert bits[:4].tolist() == [0, 1, 0, 1]
    assert set(bits.tolist()) == {0.0, 1.0}
    weights = torch.arange(len(bits), dtype=torch.float32)
    (bits * weights).sum().backward()
    torch.testing.assert_close(policy.gates.grad, weights)


def test_every_group_keeps_its_largest_gate():
    net = make()
    with torch.no_grad():
        net.policy.gates.uniform_(-1, 0.4, generator=torch.Generator().manual_seed(0))
    bits = net.policy.bits().detach()
    for where in net.policy.ranges.values():
        assert bits[where].sum() == 1
        assert bits[where].argmax() == net.policy.gates[where].argmax()


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_the_excess_is_that_of_the_exact_polynomial_with_its_derivative(kind):
    net = make(target={"macs": "0.4x", "params": "200params"}[kind])
    graph = net.graph
    cost, bound = (graph.macs, graph.macs() * 4 // 10) if kind == "macs" else (graph.params, 200)
    close(net, graph.group_names[1], 0, 3, 4)
    net.policy.excess(net.policy.bits()).backward()
    widths = {**graph.full, graph.group_names[1]: graph.full[graph.group_names[1]] - 3}
    assert float(net.policy.excess(net.policy.bits()).detach()) == pytest.approx(
        (cost(widths) - bound) / cost(), abs=1e-12
    )
    for name, where in net.policy.ranges.items():
        # Costs are affine in one width, so a difference is the derivative.
        slope = (cost({**widths, name: widths[name] + 1}) - cost(widths)) / cost()
        torch.testing.assert_close(net.policy.gates.grad[where], torch.full((graph.full[name],), slope))


def test_of_several_bounds_the_strictest_one_counts():
    """They change roles: a narrow stem saves more MACs than parameters."""
    excess = {}
    for target in ("0.5x", "352params", "0.5x,352params"):
        net = make(target=target)
        excess[target] = []
        for units in ((), range(4), range(7)):
            close(net, net.graph.group_names[0], *units)
            excess[target].append(float(net.policy.excess(net.policy.bits()).detach()))
    macs, params, both = excess.values()
    assert both == [macs[0], params[1], params[2]]
    assert not set(macs) & set(params)


@pytest.mark.parametrize("target", ["250params", "0.7x,250params"])
def test_widths_come_out_of_training_for_a_target_in_parameters(target):
    net = make(target=target)
    wk.train(net, [small_batch(i, n=16) for i in range(10)], 6, device="cpu", progress=False)
    widths = {name: len(units) for name, units in net.chosen().items()}
    assert 0.9 * 250 < net.graph.params(widths) <= 250
    assert net.graph.macs(widths) <= 0.7 * net.graph.macs()


class Times:
    """A latency that is known: 2 ms, and so much per unit of every group, where 4 units take as long as 3."""

    per_unit = np.array([0.5, 0.25, 1.0])

    def predict_ms(self, vectors):
        return 2.0 + np.where(vectors == 4, 3, vectors) @ self.per_unit


def test_widths_come_out_of_training_for_a_target_in_latency():
    net = make()
    graph, full = net.graph, Times().predict_ms(net.graph.group_widths)
    target = Budget((Limit("latency", 9.0, "9ms", latency=Times()),))
    policy = Policy(net, target, 1.0)
    excess = policy.excess(policy.bits())
    assert float(excess.detach()) == pytest.approx((full - 9) / full)
    excess.backward()
    for where, slope in zip(policy.ranges.values(), Times.per_unit, strict=True):
        torch.testing.assert_close(policy.gates.grad[where], torch.full((where.stop - where.start,), slope / full))
    widths = [len(units) for units in policy.units().values()]
    assert 8.5 <= Times().predict_ms(np.array(widths)) <= 9
    # A plateau has a slope, too: that of the step from 3 units to 5 of the first group.
    with torch.no_grad():
        policy.gates[policy.ranges[graph.group_names[0]]] = torch.tensor([1.0] * 4 + [0.0] * 4)
    policy.gates.grad = None
    policy.excess(policy.bits()).backward()
    assert (policy.gates.grad > 0).all()


def test_a_target_in_latency_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("WIDTHKIT_CACHE", str(tmp_path))
    net = make(target="1000ms@cpu")
    assert net.chosen().keys() == net.graph.full.keys()
    assert {name: len(units) for name, units in net.chosen().items()} == net.graph.full
    net.train_step(make_step())
    assert net.end_epoch()["policy_usage"] < 0.5


@pytest.mark.parametrize("min_width", ["0.1x", "0.5x"])
def test_no_group_falls_below_the_narrowest_choice_of_the_space(min_width):
    """Gates all at zero: what the cost term does to a trunk that every layer pays for."""
    net = wk.make_supernet(
        small_net(), DepthwiseBinary(target="0.6x", beta=0.0), graph=small_graph(), min_width=min_width
    )
    trunk = net.space.groups[0]
    close(net, trunk.name, *range(trunk.width))
    with torch.no_grad():
        net.policy.gates[net.policy.ranges[trunk.name].start + 2] = 0.46
    kept = np.flatnonzero(net.policy.bits().detach()[net.policy.ranges[trunk.name]].numpy())
    assert len(kept) == trunk.narrowest
    assert 2 in kept
    assert all(len(units) >= g.narrowest for g, units in zip(net.space.groups, net.chosen().values(), strict=True))
    assert net.end_epoch()["policy_narrowest"] == 1


def test_the_loss_is_the_task_plus_the_squared_excess():
    # Eq. 4 and 5, by hand: the gates' gradient is the task's plus 2 beta (M - T) / D * dM/dw / D.
    grads = []
    for beta in (0.0, 10.0):
        net = make(beta=beta)
        net.train_step(make_step())
        grads.append(net.policy.gates.grad.clone())
    graph, difference = net.graph, grads[1] - grads[0]
    slope = graph.sensitivity() * 2 * 10.0 * (graph.macs() - graph.macs() // 2) / graph.macs() ** 2
    expected = np.repeat(slope, graph.group_widths)
    torch.testing.assert_close(difference.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-6)


def test_gradients_of_open_and_closed_gates_are_the_derivatives_of_the_loss():
    # Against finite differences of a gate's factor, in float64.
    net = make(beta=0.0)
    group = net.graph.group_names[1]
    close(net, group, 0, 3)
    labels = small_batch()[1]
    net.train_step(make_step())
    bits, where = net.policy.bits().detach().double(), net.policy.ranges[group]
    for unit in (where.start, where.start + 1, where.start + 3):
        losses = []
        for shift in (-1e-5, 1e-5):
            moved = bits.clone()
            moved[unit] += shift
            with torch.no_grad():
                losses.append(float(F.cross_entropy(net.forward_gated(moved, make_step()), labels)))
        slope = (losses[1] - losses[0]) / 2e-5
        assert float(net.policy.gates.grad[unit]) == pytest.approx(slope, rel=1e-3, abs=1e-7)
        assert slope != 0


def test_closed_units_keep_their_weights_bit_by_bit_and_come_back():
    net = make(beta=0.0)
    group = net.graph.group_names[1]
    close(net, group, 0, 1, 2, 3, 4, 5)
    before = {name: p.detach().clone() for name, p in net.model.named_parameters()}
    weights = {"params": list(net.model.parameters()), "lr": 0.02}
    optimizer = torch.optim.SGD([weights, {"params": [net.policy.gates], "lr": 1.0}])
    where, gone = net.policy.ranges[group], set(range(6))
    batch = small_batch(n=32)
    for index in range(200):
        optimizer.zero_grad()
        net.train_step(make_step(index, index=index, batch=batch))
        optimizer.step()
        back = {u for u in gone if net.policy.gates[where.start + u] > 0.5}
        if back:
            break
        # Nothing that belongs to a closed unit has moved.
        for site in net.graph.groups[group].sites:
            own, old = net.model.state_dict()[site.tensor], before.get(site.tensor)
            if old is not None:
                rows = torch.from_numpy(site.index[sorted(gone)].ravel())
                assert torch.equal(own.index_select(site.dim, rows), old.index_select(site.dim, rows))
    assert back, "no gate came back"
    assert net.policy.bits()[where][sorted(back)].tolist() == [1] * len(back)


def test_closed_units_keep_their_weights_under_momentum_and_weight_decay():
    """In wk.train's own loop, with its default optimiser: momentum has been built up before the units are closed."""

    class Closing(DepthwiseBinary):
        """Closes some units after 20 steps, notes their weights, and compares them after every later update."""

        def train_step(self, net, step):
            if step.index == 20:
                close(net, group, *gone)
                before.update({name: p.detach().clone() for name, p in net.model.named_parameters()})
            return super().train_step(net, step)

        def after_update(self, net):
            super().after_update(net)
            if before:
                moved.append(max(map(_moved, _rows(net, group, gone, before))))
                others.append(max(map(_moved, _rows(net, group, [6], before))))

    before, moved, others, gone = {}, [], [], [0, 1, 2, 3, 4, 5]
    group = small_graph().group_names[1]
    net = wk.make_supernet(small_net(), Closing(beta=0.0, settle=0.0), graph=small_graph())
    with torch.no_grad():
        net.policy.gates.requires_grad_(False)  # so that no unit opens again
    assert (TrainSettings().optimizer, TrainSettings().momentum) == ("sgd", 0.9)  # Nesterov, by timm's name
    wk.train(net, [small_batch(i, n=16) for i in range(10)], 4, weight_decay=1e-2, device="cpu", progress=False)
    assert len(moved) == 20
    assert max(moved) == 0
    assert min(others) > 0


def _rows(net, group, units, before):
    """Pairs of the weights of some units, now and before."""
    now = dict(net.model.named_parameters())
    for site in net.wide_graph.groups[group].sites:
        if site.tensor in before:
            rows = torch.from_numpy(site.index[units].ravel())
            yield tuple(t.detach().index_select(site.dim, rows) for t in (now[site.tensor], before[site.tensor]))


def _moved(pair):
    return float((pair[0] - pair[1]).abs().max())


# --- what a closed gate does is what dropping the unit does -----------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv2_035", "densenet121", "mobilenetv3_small_050"])
def test_the_gated_network_is_the_exported_one(name):
    # Biases, sigmoid(0) = 1/2 of squeeze-and-excitation, hard-swish and concatenation included; float64.
    torch.manual_seed(0)
    fewer = {"block_config": (2, 2, 2, 2)} if name == "densenet121" else {}
    model = timm.create_model(name, num_classes=5, **fewer)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
    net = wk.make_supernet(model.double().eval(), "dbc", example_inputs=torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        net.policy.gates.uniform_(0, 1, generator=generator)
    kept = {name: np.flatnonzero(net.policy.bits().detach()[s].numpy()) for name, s in net.policy.ranges.items()}
    x = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        gated = net.forward_gated(net.policy.bits(), make_step(batch=(x, None)))
        exported = wk.export(net, kept)(x)
        whole = net.model(x)
    torch.testing.assert_close(gated, exported, rtol=0, atol=1e-9)
    assert (gated - whole).abs().max() > 1e-6


# --- widths out of training -------------------------------------------------------------------------------------------


def trained(target, epochs=6, out=None, resume=False, **options):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4, stem_type="", stem_width=16, channels=(16, 24, 32, 48))
    net = wk.make_supernet(model, "dbc", target=target, example_inputs=(1, 3, 16, 16), **options)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 16, 16, generator=generator)
    labels = (images[:, 0].mean((1, 2)) > 0).long() + 2 * (images[:, 1].mean((1, 2)) > 0).long()
    batches = list(zip(images.split(16), labels.split(16), strict=True)) * 2
    run = {"lr": 0.1, "device": "cpu", "progress": False, "out": out, "resume": resume}
    return net, wk.train(net, batches, epochs, **run), batches


@pytest.mark.parametrize("target", [0.35, 0.6])
def test_widths_come_out_of_training_within_one_percent(target):
    net, result, batches = trained(f"{target}x")
    units = net.chosen()
    widths = {name: len(u) for name, u in units.items()}
    assert 0.99 * target <= net.graph.macs(widths) / net.graph.macs() <= target
    assert min(widths.values()) >= 1
    # The gates themselves got there by training, not by the last adjustment: they started at 1.
    shares = [entry["policy_macs"] for entry in result.history]
    assert all(abs(share - target) < 0.12 for share in shares[2:])
    assert result.history[0]["policy_flipped"] > 0
    assert result.history[-1]["policy_flipped"] == 0
    found = wk.search(net, batches, f"{target}x", progress=False)
    assert found.widths == widths
    assert found.units == {name: u.tolist() for name, u in units.items()}
    assert (len(found.trials), found.searcher) == (1, "training")
    # By widths or by units, it is the same network.
    x = batches[0][0]
    a, b = (wk.export(net, kept).eval() for kept in (found.widths, units))
    assert torch.equal(a(x), b(x))
    with pytest.raises(BudgetError, match="train a new supernet for this budget"):
        wk.search(net, batches, f"{target / 2}x", progress=False)


def test_the_exported_network_has_the_trained_weights_bit_by_bit():
    """Every tensor, running averages included, is the trained one without the positions of the dropped units."""
    net, _, batches = trained("0.5x")
    units = net.chosen()
    slim, trained_ones = wk.export(net, units).eval(), net.model.state_dict()
    expected = dict(trained_ones)
    for name, group in net.graph.groups.items():
        gone = np.setdiff1d(np.arange(group.width), units[name])
        for site in group.sites:
            size = trained_ones[site.tensor].shape[site.dim]
            left = np.setdiff1d(np.arange(size), site.index[gone].reshape(-1))
            # Two dims of one weight are cut one after the other.
            expected[site.tensor] = expected[site.tensor].index_select(site.dim, torch.from_numpy(left))
    found = slim.state_dict()
    assert sum(v.numel() for v in found.values()) < 0.9 * sum(v.numel() for v in trained_ones.values())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    x, y = batches[0]
    with torch.no_grad():
        assert torch.equal(slim(x), net.eval().set_widths(units)(x))
    # The last part of training ran this sub-network, so its running averages fit without recalibration.
    x, y = (torch.cat(parts) for parts in zip(*batches[:4], strict=True))
    assert (slim(x).argmax(1) == y).float().mean() > 0.5


def test_the_policy_survives_an_interruption(tmp_path):
    whole, _, _ = trained("0.5x", epochs=4)
    with pytest.raises(KeyboardInterrupt):
        stop_after(2, tmp_path)
    again, result, _ = trained("0.5x", epochs=4, out=tmp_path, resume=True)
    assert torch.equal(again.policy.gates, whole.policy.gates)
    assert torch.equal(again.policy.kept, whole.policy.kept)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))
    assert [entry["epoch"] for entry in result.history] == [1, 2, 3, 4]
    assert "policy_macs" in result.history[0]
    with pytest.raises(CheckpointError, match="target"):
        trained("0.4x", epochs=4, out=tmp_path, resume=True)


def stop_after(epoch, out):
    original = wk.Supernet.end_epoch
    done = []

    def end_epoch(self):
        done.append(None)
        if len(done) > epoch:
            raise KeyboardInterrupt
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wk.Supernet, "end_epoch", end_epoch)
        trained("0.5x", epochs=4, out=out)


def test_a_result_with_units_can_be_saved(tmp_path):
    net, _, batches = trained("0.5x", epochs=1)
    found = wk.search(net, batches, "0.5x", out=tmp_path, progress=False)
    assert SearchResult.load(tmp_path / "search.json").units == found.units != {}


def test_fixed_and_narrowed_groups_have_no_say():
    names = small_graph().group_names
    net = wk.make_supernet(
        small_net(), "dbc", graph=small_graph(), fixed={names[0]: 3}, max_width="0.75x", target="0.3x"
    )
    units = net.chosen()
    assert units[names[0]].tolist() == [0, 1, 2]
    for g in net.space.groups:
        assert len(units[g.name]) <= g.widest
        assert units[g.name].max() < g.widest
    net.train_step(make_step())
    assert (net.policy.gates.grad[net.policy.ranges[names[0]]] == 0).all()


def test_an_untrained_policy_shrinks_all_groups_alike():
    net = make(target="0.4x")
    shares = [len(units) / net.graph.full[name] for name, units in net.chosen().items()]
    assert max(shares) - min(shares) < 0.25


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"target": "0.0001x"}, BudgetError, "below the narrowest network of this space"),
        ({"target": "0.2x", "min_width": "0.5x"}, BudgetError, r"raise it or lower min_width"),
        ({"target": "12MB"}, OptionError, "trained for MACs, parameters or latency"),
        ({"target": 0.5}, OptionError, "target=0.5"),
        ({"beta": -1.0}, OptionError, "beta"),
        ({"start": 0.5}, OptionError, "start"),
        ({"settle": 2.0}, OptionError, "settle"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(options, error, text):
    limits = {name: options.pop(name) for name in ("min_width",) if name in options}
    with pytest.raises(error, match=text):
        wk.make_supernet(small_net(), DepthwiseBinary(**options), graph=small_graph(), **limits)
