"""The strategy that trains the whole network: against plain training, hand-made pruning, and torch-pruning's own."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from widthkit_plugins.strategies.whole import WholeNetwork

import widthkit as wk
from benchmarks.nets import SmallResNet
from benchmarks.oracles import check_equal, outputs
from widthkit.search.evaluator import Evaluator
from widthkit.supernet.ranking import unit_scores
from widthkit.testing import StrategyConformance, small_batch, small_graph, small_net
from widthkit.train.engine import train

TRAIN = [small_batch(i) for i in range(4)]
VALID = [small_batch(20, n=16)]


class TestWholeNetwork(StrategyConformance):
    @pytest.fixture
    def strategy(self):
        return WholeNetwork()


def ranked_by_hand(model, graph):
    """The units of every group, the largest sum of squares over what they own first: plain loops, no torch-pruning."""
    modules = dict(model.named_modules())
    found = {}
    for name, group in graph.groups.items():
        total = np.zeros(group.width)
        for site in group.sites:
            path, _, key = site.tensor.rpartition(".")
            if key == "weight" and isinstance(modules[path], (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
                tensor = model.get_parameter(site.tensor).detach()
                for unit, places in enumerate(site.index):
                    total[unit] += sum(float(tensor.select(site.dim, int(p)).square().sum()) for p in places)
        found[name] = np.argsort(-total, kind="stable")
    return found


def test_training_is_ordinary_training_to_the_last_bit():
    plain, options = small_net(), {"lr": 0.05, "seed": 3, "device": "cpu", "progress": False}
    net = wk.make_supernet(small_net(), "whole", graph=small_graph())
    ours, theirs = train(net, TRAIN, 2, **options), train(plain, TRAIN, 2, **options)
    assert [e["loss"] for e in ours.history] == [e["loss"] for e in theirs.history]
    for name, value in plain.state_dict().items():
        assert torch.equal(net.model.state_dict()[name], value), name


def test_widths_of_a_ranked_model_are_the_hand_pruned_model():
    """No training at all: the exported network computes what the model computes without its weakest units."""
    model, graph = small_net().eval(), small_graph()
    net = wk.make_supernet(model, "whole", graph=graph, rank="magnitude").eval()
    x = VALID[0][0]
    check_equal(outputs(net, x), outputs(model, x))
    order = ranked_by_hand(model, graph)
    widths = {"stem.0": 5, "expand.0": 7, "top.0": 3}
    kept = {name: np.sort(order[name][:width]) for name, width in widths.items()}
    by_hand = wk.export(model, kept, graph=graph).eval()
    slim = wk.export(net, widths).eval()
    check_equal(outputs(slim, x), outputs(by_hand, x))
    ours, theirs = (sorted(p.detach().double().norm().item() for p in m.parameters()) for m in (slim, by_hand))
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    assert any(not torch.equal(a, b) for a, b in zip(slim.parameters(), by_hand.parameters(), strict=True))


def test_a_search_without_training_judges_by_batch_statistics():
    """The score is the loss of the hand-pruned network in training mode, whatever its running averages are."""
    model, graph = small_net(), small_graph()
    net = wk.make_supernet(model, "whole", graph=graph, rank="magnitude", k=4, min_width="0.25x")
    result = wk.search(net, VALID, "0.5x", "greedy", progress=False)
    assert result.macs <= 0.5 * graph.macs()
    order = ranked_by_hand(model, graph)
    kept = {name: np.sort(order[name][:width]) for name, width in result.widths.items()}
    by_hand = wk.export(model, kept, graph=graph).train()
    with torch.no_grad():
        assert result.score == pytest.approx(-float(F.cross_entropy(by_hand(VALID[0][0]), VALID[0][1])), abs=1e-9)
    best = max(t.score for t in result.trials if 0.97 * 0.5 * graph.macs() < t.macs <= 0.5 * graph.macs())
    assert result.score == best


def test_local_pruning_is_torch_prunings():
    """Half of every group, on a network that its tracer understands: equal outputs, so equal units."""
    import torch_pruning as tp

    torch.manual_seed(0)
    model = SmallResNet(width=8, blocks=1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
    model.eval()
    x = torch.randn(4, 3, 16, 16)
    net = wk.make_supernet(model, "whole", example_inputs=x, rank="magnitude")
    slim = wk.export(net, {name: width // 2 for name, width in net.graph.full.items()}).eval()
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    tp.pruner.BasePruner(model, x, importance=importance, pruning_ratio=0.5, ignored_layers=[model.head]).step()
    assert sum(p.numel() for p in slim.parameters()) == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(slim(x), model(x), rtol=1e-4, atol=1e-5)


def test_ranking_follows_the_model_that_is_given():
    """Scores of another criterion put other units first."""
    model, graph = small_net(), small_graph()
    by = {c: wk.make_supernet(model, "whole", graph=graph, rank=c, rank_data=TRAIN) for c in ("magnitude", "taylor")}
    widths = {"expand.0": 4}
    judged = {c: Evaluator(net, VALID, F.cross_entropy)(widths).score for c, net in by.items()}
    assert judged["magnitude"] != judged["taylor"]
    best = np.sort(unit_scores(model, graph, "taylor", data=TRAIN)["expand.0"])[::-1][:4]
    found = unit_scores(by["taylor"].model, graph, "taylor", data=TRAIN)["expand.0"][:4]
    np.testing.assert_allclose(found, best, rtol=1e-5)
