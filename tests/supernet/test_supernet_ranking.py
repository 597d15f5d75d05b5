"""Importance against closed forms and torch-pruning's own groups; arranged supernets against their models."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from topologies import (
    Attention,
    DeadBranch,
    DenseBlock,
    FlattenLinear,
    GroupedByPosition,
    InvertedResidual,
    ShuffleUnit,
    Transposed,
    TransposedGrouped,
)
from torch import nn
from widthkit_plugins.strategies.bc import BilaterallyCoupled, both_ends
from widthkit_plugins.strategies.bcv2 import BilaterallyCoupledV2

from benchmarks.oracles import check_equal, outputs
from widthkit.errors import DataError, OptionError
from widthkit.graph import ChannelGraph
from widthkit.graph.space import GroupChoices
from widthkit.run.build import build
from widthkit.run.config import RunConfig
from widthkit.run.dense import fresh_model
from widthkit.run.folder import RunFolder
from widthkit.supernet import make_supernet
from widthkit.supernet.ranking import CRITERIA, unit_scores
from widthkit.supernet.strategy import STRATEGIES
from widthkit.testing import small_batch, small_graph, small_net
from widthkit.trace import trace

BATCHES = [small_batch(seed) for seed in range(2)]


def plain():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.Conv2d(6, 5, 3),
        nn.SiLU(),
        nn.Conv2d(5, 4, 2),
        nn.Flatten(),
    ).double()
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    return model


def scores(criterion, **more):
    model = plain()
    return model, unit_scores(model, trace(model, BATCHES[0][0]), criterion, data=BATCHES, **more)


# --- closed forms -----------------------------------------------------------------------------------------------------


def close(actual, expected):
    # torch-pruning sums in float32.
    np.testing.assert_allclose(actual, expected / expected.mean(), rtol=1e-5)


def test_magnitude_is_the_squared_norm_of_all_that_a_unit_owns():
    model, found = scores("magnitude")
    w, bn, v = (t.detach() for t in (model[0].weight, model[1].weight, model[3].weight))
    expected = w.square().sum((1, 2, 3)) + bn.square() + v.square().sum((0, 2, 3))
    close(found["0"], expected.numpy())


def test_bn_scale_is_the_absolute_weight_of_the_norm_and_even_where_there_is_none():
    model, found = scores("bn-scale")
    close(found["0"], model[1].weight.detach().abs().numpy())
    assert found["3"].tolist() == [1.0] * 5


def gradients(model, batches):
    """Mean gradient over the samples, by plain autograd in evaluation mode."""
    model.eval()
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return torch.autograd.grad(F.cross_entropy(model(images), labels), list(model.parameters()))


def test_taylor_is_weight_times_gradient():
    model, found = scores("taylor")
    grads = dict(zip([n for n, _ in model.named_parameters()], gradients(plain(), BATCHES), strict=True))
    products = {n: (p.detach() * grads[n]).abs() for n, p in model.named_parameters()}
    expected = products["3.weight"].sum((1, 2, 3)) + products["5.weight"].sum((0, 2, 3))
    close(found["3"], expected.numpy())


def test_hessian_is_squared_weight_times_mean_squared_gradient_of_the_samples():
    model, found = scores("hessian")
    twin, names = plain().eval(), [n for n, _ in model.named_parameters()]
    fisher = dict.fromkeys(names, 0.0)
    samples = [(x[None], y[None]) for images, labels in BATCHES for x, y in zip(images, labels, strict=True)]
    for x, y in samples:
        for name, grad in zip(
            names, torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters())), strict=True
        ):
            fisher[name] = fisher[name] + grad.square() / len(samples)
    products = {n: p.detach().square() * fisher[n] for n, p in model.named_parameters()}
    expected = products["3.weight"].sum((1, 2, 3)) + products["5.weight"].sum((0, 2, 3))
    close(found["3"], expected.numpy())


def test_flattened_positions_count_for_their_channel():
    torch.manual_seed(0)
    model = FlattenLinear().double()
    graph = trace(model, (2, 3, 8, 8))
    found = unit_scores(model, graph)
    for name, group in graph.groups.items():
        expected = np.zeros(group.width)
        for site in group.sites:
            key = site.tensor.rpartition(".")[2]
            if key == "weight":
                tensor = model.get_parameter(site.tensor).detach().movedim(site.dim, 0)
                tensor = tensor.reshape(len(tensor), -1).square().sum(1)
                expected += tensor.numpy()[site.index].sum(1)
        np.testing.assert_allclose(found[name] / found[name].mean(), expected / expected.mean(), rtol=1e-5)


@pytest.mark.parametrize("criterion", ["magnitude", "lamp", "fpgm", "bn-scale"])
def test_groups_built_from_ours_score_as_torch_prunings_own(criterion):
    """On a network that its tracer understands."""
    import torch_pruning as tp
    from torch_pruning.pruner import importance

    from benchmarks.nets import SmallResNet

    torch.manual_seed(0)
    model = SmallResNet(width=4, blocks=1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    x = torch.randn(1, 3, 16, 16)
    ours = unit_scores(model, trace(model, x), criterion)
    theirs = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    scorer = getattr(importance, CRITERIA[criterion])()
    for name in ("stages.0.conv1", "stages.1.conv1", "stages.2.conv1", "stem.0"):
        layer = model.get_submodule(name)
        group = theirs.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(layer.out_channels)))
        np.testing.assert_allclose(ours[name], scorer(group).double().numpy(), rtol=1e-4)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(
    "make",
    [
        InvertedResidual,
        DenseBlock,
        Attention,
        Transposed,
        TransposedGrouped,
        DeadBranch,
        ShuffleUnit,
        GroupedByPosition,
    ],
    ids=lambda m: m.__name__,
)
def test_every_criterion_scores_every_unit(criterion, make):
    torch.manual_seed(0)
    model = make()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    graph = trace(model, x)
    found = unit_scores(model, graph, criterion, data=[(x, None)], loss=lambda y, _: y.square().mean())
    assert {n: len(s) for n, s in found.items()} == graph.full
    assert all(np.isfinite(s).all() and (s >= 0).all() for s in found.values())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_refusals():
    model, graph = small_net(), small_graph()
    with pytest.raises(OptionError, match="did you mean taylor"):
        unit_scores(model, graph, "tailor")
    with pytest.raises(OptionError, match="'taylor' needs gradients"):
        make_supernet(model, "bc", graph=graph, rank="taylor")
    with pytest.raises(DataError, match="no batch"):
        unit_scores(model, graph, "hessian", data=[])
    with pytest.raises(OptionError, match="rank needs"):
        make_supernet(model, "bc", graph=graph, rank={"stem.0": [1.0, 2.0]})


# --- arranged supernets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES.names())
@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_the_output_at_full_width_is_the_models(strategy, criterion):
    model, graph = small_net(), small_graph()
    net = make_supernet(
        model,
        strategy,
        graph=graph,
        k=4,
        min_width="0.25x",
        rank=criterion,
        rank_data=BATCHES,
        rank_loss=F.cross_entropy,
    )
    model.eval(), net.eval()
    assert any(not torch.equal(a[: len(b)], b) for a, b in zip(net.model.parameters(), model.parameters(), strict=True))
    check_equal(outputs(net, BATCHES[0][0]), outputs(model, BATCHES[0][0]))


def kept(strategy, model, graph, path):
    """Share of the first group's importance that its narrowest sub-network holds."""
    net = make_supernet(model, strategy, graph=graph, k=4, min_width="0.25x", rank="magnitude")
    name = graph.group_names[0]
    found = unit_scores(net.model, net.wide_graph)[name]
    units = net.paths(net.space.smallest)[path][name]
    best = np.sort(unit_scores(model, graph)[name])[::-1]
    return found[units], best


@pytest.mark.parametrize(("strategy", "path", "ranks"), [("ua", 0, [0, 1]), ("bc", 0, [0, 2]), ("bc", 1, [1, 3])])
def test_narrow_networks_hold_the_important_units(strategy, path, ranks):
    units, best = kept(strategy, small_net(), small_graph(), path)
    np.testing.assert_allclose(np.sort(units)[::-1], best[ranks], rtol=1e-6)


@pytest.mark.parametrize("layout", ["exact", "text"])
def test_both_networks_of_bcv2_are_the_model_at_full_width(layout):
    model, graph = small_net().eval(), small_graph()
    net = make_supernet(
        model, BilaterallyCoupledV2(layout), graph=graph, k=4, min_width="0.5x", rank="magnitude"
    ).eval()
    for path in (0, 1):
        check_equal(outputs(net.set_widths(graph.full, path), BATCHES[0][0]), outputs(model, BATCHES[0][0]))


def test_orders_by_hand():
    ranking = np.array([7, 3, 5, 1, 2, 0, 4, 6])
    assert both_ends(ranking).tolist() == [7, 5, 2, 4, 6, 0, 1, 3]
    choices = GroupChoices("g", 8, (2, 4, 6, 8))
    # Capacity 10: the two best are both bases, the others are dealt out between them.
    assert BilaterallyCoupledV2().order(ranking, choices).tolist() == [7, 3, 5, 2, 4, 6, 0, 1, 7, 3]
    assert BilaterallyCoupled().order(ranking, GroupChoices("g", 8, (2, 4))).tolist() == [7, 5, 1, 3, 2, 0, 4, 6]


def test_an_order_that_loses_units_is_refused():
    class Broken(BilaterallyCoupled):
        """Loses a unit."""

        def order(self, ranking, choices):
            return np.zeros_like(ranking)

    with pytest.raises(OptionError, match=r"Broken: order\(\) of group 'stem.0' must name each of its 8 units once"):
        make_supernet(small_net(), Broken(), graph=small_graph(), rank="magnitude")


def test_groups_are_those_of_the_graph():
    assert isinstance(small_graph(), ChannelGraph)
    assert set(unit_scores(small_net(), small_graph())) == set(small_graph().group_names)


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_a_run_ranks_its_supernet_by_training_images(tmp_path, criterion):
    config = RunConfig(model="timm/test_resnet", data="digits", limit=48, rank=criterion, rank_images=20, batch_size=16)
    built = build(config, RunFolder(tmp_path), search=False, progress=False)
    net, data = built.net, built.data
    model = fresh_model(config, data, config.seed)
    images = torch.stack([data.train[i][0] for i in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(images), model.eval()(images), rtol=1e-4, atol=1e-5)
    pairs = zip(net.model.parameters(), model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    with pytest.raises(OptionError, match="did you mean taylor"):
        build(config.changed({"rank": "tylor"}), RunFolder(tmp_path), search=False, progress=False)
