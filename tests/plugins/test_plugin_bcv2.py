"""BCNetV2 against its paper: cardinalities counted from real gradients (Eq. 18-21), turns (Eq. 22)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from widthkit_plugins.strategies.bc import BilaterallyCoupled
from widthkit_plugins.strategies.bcv2 import BilaterallyCoupledV2
from widthkit_plugins.strategies.ua import UniversallyAligned

from benchmarks.strategy_memory import count_saved, one_backward
from widthkit.errors import OptionError
from widthkit.graph.space import GroupChoices, SearchSpace
from widthkit.supernet import make_supernet
from widthkit.testing import StrategyConformance, make_step

WIDTH, BASE = 8, 3


class TestBilaterallyCoupledV2(StrategyConformance):
    @pytest.fixture(
        params=[{}, {"layout": "text"}, {"iterative": False}, {"complementary": False, "iterative": False}], ids=str
    )
    def strategy(self, request):
        return BilaterallyCoupledV2(**request.param)


def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((6, 3, 5, 5), generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 4, (6,), generator=generator)


def one_layer(strategy, options=tuple(range(BASE, WIDTH + 1))):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.Tanh(), nn.Conv2d(WIDTH, 4, 3), nn.Flatten()).double()
    probe = make_supernet(model, "ua", example_inputs=batch()[0], k=WIDTH)
    space = SearchSpace(probe.graph, (GroupChoices("0", WIDTH, options),))
    return make_supernet(model, strategy, graph=probe.graph, space=space)


def used(net):
    return (net.model[0].weight.grad != 0).flatten(1).any(1).int()


def cardinality(net, paths=2):
    images, labels = batch()
    total = torch.zeros(net.model[0].out_channels, dtype=torch.int32)
    for width in net.space.groups[0].options:
        for path in range(paths):
            net.zero_grad()
            F.cross_entropy(net.set_widths({"0": width}, path)(images), labels).backward()
            total += used(net)
    return total.tolist()


def test_the_exact_layout_uses_every_channel_equally_often():
    # Eq. 21: l + 1 - l_s, for base channels and shared ones alike.
    net = one_layer(BilaterallyCoupledV2())
    assert net.model[0].out_channels == WIDTH + BASE
    assert cardinality(net) == [WIDTH + 1 - BASE] * (WIDTH + BASE)


def test_the_layout_of_the_text_uses_shared_channels_once_more():
    net = one_layer(BilaterallyCoupledV2(layout="text"))
    counts = cardinality(net)
    assert len(counts) == WIDTH + BASE - 1
    uniform = WIDTH + 1 - BASE
    # Channels that both ends reach, beyond either base, are used once more.
    assert counts == [uniform] * (BASE - 1) + [uniform + 1] * (WIDTH - BASE + 1) + [uniform] * (BASE - 1)


def used_by_left(c):
    # Eq. 18; channels count from 1.
    return WIDTH - max(c, BASE) + 1


def test_ua_with_base_widths_uses_the_base_alike():
    counts = cardinality(one_layer(UniversallyAligned()), paths=1)
    assert counts == [used_by_left(c) for c in range(1, WIDTH + 1)]


def test_bc_with_base_widths_is_unfair():
    # Eq. 19: l + 1 + c - l_s at the base of either end, l + 1 between them: the ends are used less than the middle.
    counts = cardinality(one_layer(BilaterallyCoupled()))
    expected = []
    for c in range(1, WIDTH + 1):
        near = min(c, WIDTH + 1 - c)
        expected.append(WIDTH + 1 if near >= BASE else WIDTH + 1 + near - BASE)
    assert counts == expected == [used_by_left(c) + used_by_left(WIDTH + 1 - c) for c in range(1, WIDTH + 1)]
    assert counts[0] == counts[-1] == min(counts) < max(counts)


@pytest.mark.parametrize("width", range(BASE, WIDTH + 1))
def test_a_width_and_its_complement_train_every_channel_once_per_pair_of_turns(width, monkeypatch):
    monkeypatch.setattr(SearchSpace, "sample", lambda space, rng: {"0": width})
    net = one_layer(BilaterallyCoupledV2())
    total = torch.zeros(WIDTH + BASE, dtype=torch.int32)
    by_turn = []

    def backward(loss):
        net.zero_grad()
        loss.backward()
        total.add_(used(net))
        by_turn.append(used(net))

    for index in (0, 1):
        step = make_step(batch=batch(), backward=backward)
        step.index = index
        net.train_step(step)
    # Left c and right c-bar meet exactly, and so do left c-bar and right c.
    assert total.tolist() == [2] * (WIDTH + BASE)
    assert all(turn[0] == 1 for turn in by_turn[:2])
    assert all(turn[-1] == 1 for turn in by_turn[2:])


def test_updates_in_turns_keep_half_the_activations(monkeypatch):
    # Counted from what autograd saves, against both ends in one backward (Eq. 10), width by width.
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, 4, 3), nn.Flatten()]
    space = {"k": 4, "min_width": "0.5x"}
    for width in (WIDTH, WIDTH // 2):
        monkeypatch.setattr(SearchSpace, "sample", lambda space, rng, width=width: {"0": width})
        peaks = {}
        for iterative in (True, False):
            strategy = BilaterallyCoupledV2(iterative=iterative, complementary=False)
            net = make_supernet(nn.Sequential(*layers), strategy, example_inputs=(1, 3, 9, 9), **space)
            images, labels = torch.randn(7, 3, 9, 9), torch.zeros(7, dtype=torch.long)
            # Shared by both ends, so not part of what doubles.
            shared = images.nbytes + labels.nbytes
            with count_saved(7) as saved:
                net.train_step(make_step(batch=(images, labels)))
            peaks[iterative] = saved.peak - shared
            both = one_backward(net, net.paths({"0": width}), make_step(batch=(images, labels))) - shared
            total = saved.total
        assert peaks[True] * 2 == both
        # Both ends on one batch, but one backward after the other: twice the work, not twice the memory.
        assert peaks[False] == peaks[True]
        assert total > peaks[False] + shared


def test_only_two_layouts_are_known():
    with pytest.raises(OptionError, match="exact"):
        BilaterallyCoupledV2(layout="papers")
