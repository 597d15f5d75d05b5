"""BCNetV2 against its paper: cardinalities counted from real gradients (Eq. 18-21), turns (Eq. 22)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from widthkit_plugins.bc import BilaterallyCoupled
from widthkit_plugins.bcv2 import BilaterallyCoupledV2

from widthkit.errors import OptionError
from widthkit.space import GroupChoices, SearchSpace
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


def cardinality(net):
    images, labels = batch()
    total = torch.zeros(net.model[0].out_channels, dtype=torch.int32)
    for width in net.space.groups[0].options:
        for path in range(2):
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


def test_bc_with_base_widths_is_unfair():
    # Eq. 19: without bases of their own, channels near the ends are used less than those in the middle.
    counts = cardinality(one_layer(BilaterallyCoupled()))
    assert len(set(counts)) > 1


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


def test_only_two_layouts_are_known():
    with pytest.raises(OptionError, match="exact"):
        BilaterallyCoupledV2(layout="papers")
