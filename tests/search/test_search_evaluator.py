"""Judging: losses with batch statistics, on whatever held-out data there is."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from widthkit_plugins.strategies.bc import BilaterallyCoupled
from widthkit_plugins.strategies.ua import UniversallyAligned

from widthkit.errors import DataError, OptionError, PluginError
from widthkit.export.dense import export
from widthkit.search import Judging
from widthkit.search.evaluator import Evaluator
from widthkit.supernet import make_supernet
from widthkit.testing import small_batch, small_graph, small_net
from widthkit.train import batch_statistics

LOADER = [small_batch(seed) for seed in range(3)]


def build(strategy=None, **options):
    return make_supernet(small_net(), strategy or BilaterallyCoupled(), graph=small_graph(), k=4, **options)


@pytest.mark.parametrize("strategy", [UniversallyAligned(), BilaterallyCoupled()])
def test_a_judgement_is_the_loss_of_the_exported_networks_with_batch_statistics(strategy):
    net = build(strategy)
    widths = net.space.sample(np.random.default_rng(1))
    images, labels = (torch.cat(parts) for parts in zip(*LOADER, strict=True))
    losses, hits = [], []
    for path in range(len(net.paths(widths))):
        slim = export(net, widths, path=path).train()  # training mode normalises by the batch
        with torch.no_grad():
            outputs = slim(images)
        losses.append(float(F.cross_entropy(outputs, labels)))
        hits.append(float((outputs.argmax(1) == labels).double().mean()))
    judgement = Evaluator(net, LOADER, F.cross_entropy)(widths)
    assert judgement.loss == pytest.approx(np.mean(losses), abs=1e-12)
    assert judgement.score == pytest.approx(-np.mean(losses), abs=1e-12)
    assert judgement.accuracy == pytest.approx(np.mean(hits), abs=1e-12)


def test_several_batches_count_by_their_examples():
    net = build(UniversallyAligned())
    widths = net.space.smallest
    judge = Evaluator(net, LOADER, F.cross_entropy, Judging(batch_size=10))
    assert [batch.n for batch in judge.batches] == [8, 8, 8]
    assert sum(batch.n for batch in Evaluator(net, LOADER, F.cross_entropy, Judging(batch_size=7)).batches) == 24
    slim = export(net, widths)
    losses = []
    for images, labels in LOADER:
        with torch.no_grad(), batch_statistics(slim):
            losses.append(float(F.cross_entropy(slim(images), labels)))
    assert judge(widths).loss == pytest.approx(np.mean(losses), abs=1e-12)


def test_parts_of_the_data_are_as_equal_as_they_can_be():
    images, labels = torch.zeros(10, 3), torch.zeros(10, dtype=torch.long)
    judge = Evaluator(build(), [(images, labels)], F.cross_entropy, Judging(batch_size=4))
    assert [batch.n for batch in judge.batches] == [4, 3, 3]


@pytest.mark.parametrize("strategy", ["bc", "locally-free"])
@pytest.mark.parametrize("training", [True, False])
def test_judging_leaves_the_supernet_bit_identical(training, strategy):
    """Also where a path takes units from all over a layer."""
    net = build(strategy).train(training)
    net.model.top.eval()
    before = copy.deepcopy(net.state_dict())
    modes = [m.training for m in net.modules()]
    judge = Evaluator(net, LOADER, F.cross_entropy)
    judge(net.space.smallest)
    dict(judge.judge_many([net.space.sample(np.random.default_rng(seed)) for seed in range(4)]))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert all(p.grad is None and not p.is_inference() for p in net.parameters())


def test_judging_is_repeatable_and_needs_no_running_statistics():
    net = build()
    judge = Evaluator(net, LOADER, F.cross_entropy)
    first = judge(net.space.largest)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(1e3)
    assert judge(net.space.largest) == first


def test_outputs_that_are_no_class_scores_have_no_accuracy():
    loader = [(images, torch.zeros(len(images), 4, dtype=torch.float64)) for images, _ in LOADER]
    judgement = Evaluator(build(), loader, F.mse_loss)(small_graph().full)
    assert judgement.accuracy is None
    assert judgement.score == -judgement.loss < 0


def test_batches_of_other_kinds_stay_as_they_come():
    """Keyword inputs, lists of targets, images of two sizes."""
    net = build(UniversallyAligned())
    images, labels = LOADER[0]
    keyword = Evaluator(net, [({"x": images}, {"labels": labels})], lambda o, t: F.cross_entropy(o, t["labels"]))
    assert [batch.n for batch in keyword.batches] == [8]
    plain = Evaluator(net, [LOADER[0]], F.cross_entropy)
    assert keyword(net.space.smallest).loss == pytest.approx(plain(net.space.smallest).loss)
    sizes = Evaluator(net, [LOADER[0], (images[..., :5], labels), LOADER[1]], F.cross_entropy)
    assert sorted(batch.n for batch in sizes.batches) == [8, 16]
    lists = Evaluator(net, [(images, list(labels))], lambda o, t: F.cross_entropy(o, torch.stack(t)))
    assert lists(net.space.smallest).loss == pytest.approx(plain(net.space.smallest).loss)


@pytest.mark.parametrize(
    "loader",
    [[], [torch.zeros(2)], [(torch.zeros(0, 3, 6, 6), torch.zeros(0))], [(torch.zeros(2, 3), torch.zeros(3))]],
    ids=["none", "no pair", "empty", "unequal"],
)
def test_held_out_data_that_is_not(loader):
    with pytest.raises(DataError, match="held-out"):
        Evaluator(build(), loader, F.cross_entropy)


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"batch_size": -3}, {"memory": "lots"}, {"memory": -1}], ids=str
)
def test_options_of_judging_that_make_no_sense(options):
    (name, value), *_ = options.items()
    with pytest.raises(OptionError, match=f"{name}={value!r}"):
        Judging(**options)


def test_networks_that_draw_random_numbers_draw_the_same_every_time():
    """Width vectors are compared on equal terms, and the caller's generators stay as they are."""
    net = build(UniversallyAligned())
    net.model.register_forward_hook(lambda _, __, output: output + torch.randn_like(output))
    judge = Evaluator(net, LOADER, F.cross_entropy)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = judge(net.space.smallest)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert judge(net.space.smallest) == first
    assert dict(judge.judge_many([net.space.largest, net.space.smallest]))[1] == first


def test_a_strategy_that_combines_scores_into_no_number_is_named():
    class Odd(UniversallyAligned):
        def combine(self, scores):
            return "best"

    net = build(Odd())
    with pytest.raises(PluginError, match=r"strategy Odd: combine\(\) must return a number, not 'best'"):
        Evaluator(net, LOADER, F.cross_entropy)(net.space.smallest)


def test_judging_in_training_mode_keeps_the_mode_and_shares_nothing():
    """Models that return their losses in training mode only; the statistics are those of the batch all the same."""
    net = build(UniversallyAligned()).eval()
    vectors = [net.space.smallest, net.space.largest]
    judge = Evaluator(net, LOADER, F.cross_entropy, Judging(training=True))
    modes = []
    net.model.register_forward_hook(lambda module, _, __: modes.append(module.training))
    found = dict(judge.judge_many(vectors))
    assert modes == [True, True]
    assert judge.unshared == "the network is judged in training mode"
    assert not any(module.training for module in net.modules())
    plain = Evaluator(net, LOADER, F.cross_entropy)
    assert [found[i].loss for i in range(2)] == pytest.approx([plain(v).loss for v in vectors], abs=1e-12)
