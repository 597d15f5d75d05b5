"""The strategies against their papers: cardinalities counted from real gradients, steps against autograd by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from widthkit_plugins.strategies.bc import BilaterallyCoupled
from widthkit_plugins.strategies.ua import UniversallyAligned

from widthkit.errors import OptionError
from widthkit.graph.space import GroupChoices, SearchSpace, make_space
from widthkit.modules.models import create_model
from widthkit.supernet import make_supernet
from widthkit.supernet.strategy import can_distill
from widthkit.testing import make_step
from widthkit.trace import trace
from widthkit.train.losses import cross_entropy

WIDTH = 7


def batch(n=6, classes=4):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((n, 3, 5, 5), generator=generator, dtype=torch.float64)
    return images, torch.randint(0, classes, (n,), generator=generator)


# --- cardinality: how often the widths of a layer use each channel ----------------------------------------------------


def one_layer(strategy, width=WIDTH):
    """One group; a smooth activation, so that a gradient of zero means that a channel was not used."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, width, 3), nn.Tanh(), nn.Conv2d(width, 4, 3), nn.Flatten()).double()
    return make_supernet(model, strategy, example_inputs=batch()[0], k=width)


def used_channels(net):
    """Which channels the gradients reached, as the layer writes them and as the next one reads them."""
    writer, reader = net.model[0].weight.grad, net.model[2].weight.grad
    written = (writer != 0).flatten(1).any(1).int()
    assert torch.equal(written, (reader != 0).transpose(0, 1).flatten(1).any(1).int())
    assert torch.equal(written, (net.model[0].bias.grad != 0).int())
    return written


def cardinality(net, vectors):
    """Sum of :func:`used_channels` over all paths of all widths."""
    images, labels = batch()
    total = torch.zeros(net.model[0].out_channels, dtype=torch.int32)
    for widths in vectors:
        for path in range(len(net.paths(widths))):
            net.zero_grad()
            F.cross_entropy(net.set_widths(widths, path)(images), labels).backward()
            total += used_channels(net)
    return total.tolist()


def trained_per_step(net, monkeypatch, width):
    """How many of one step's backwards train each channel when the step draws a certain width."""
    monkeypatch.setattr(SearchSpace, "sample", lambda space, rng: {"0": width})
    total = torch.zeros(WIDTH, dtype=torch.int32)

    def backward(loss):
        net.zero_grad()
        loss.backward()
        total.add_(used_channels(net))

    net.train_step(make_step(batch=batch(), backward=backward))
    return total.tolist()


ALL_WIDTHS = [{"0": c} for c in range(1, WIDTH + 1)]


def test_ua_uses_channel_c_in_l_minus_c_plus_1_widths():
    # BCNet, Eq. 6; channels count from 1.
    assert cardinality(one_layer(UniversallyAligned()), ALL_WIDTHS) == [WIDTH - c + 1 for c in range(1, WIDTH + 1)]


@pytest.mark.parametrize("width", [2, 6, 7])
def test_bc_uses_every_channel_in_l_plus_1_widths(width):
    # BCNet, Eq. 9.
    net = one_layer(BilaterallyCoupled(), width)
    assert cardinality(net, [{"0": c} for c in range(1, width + 1)]) == [width + 1] * width


@pytest.mark.parametrize("width", range(1, WIDTH + 1))
def test_bc_with_complement_trains_every_channel_equally_often(width, monkeypatch):
    # BCNet, Fig. 2: twice per pair. A full width is its own complement, so all channels are trained by all four paths.
    trained = trained_per_step(one_layer(BilaterallyCoupled(complement="paper")), monkeypatch, width)
    assert trained == [4 if width == WIDTH else 2] * WIDTH


@pytest.mark.parametrize("width", range(1, WIDTH + 1))
def test_a_complement_inside_the_space_trains_one_channel_more_from_either_end(width, monkeypatch):
    # c with l + 1 - c: both ends of both widths cover every channel twice, and overlap in one channel each.
    trained = trained_per_step(one_layer(BilaterallyCoupled()), monkeypatch, width)
    assert trained == [2 + (i == width - 1) + (i == WIDTH - width) for i in range(WIDTH)]


@pytest.mark.parametrize("width", range(1, WIDTH))
def test_bc_without_complement_trains_both_ends(width, monkeypatch):
    trained = trained_per_step(one_layer(BilaterallyCoupled(complementary=False)), monkeypatch, width)
    assert trained == [int(i < width) + int(i >= WIDTH - width) for i in range(WIDTH)]


@pytest.mark.parametrize("width", range(1, WIDTH + 1))
def test_ua_trains_left_channels_most_often(width, monkeypatch):
    # Largest, smallest and one drawn width.
    trained = trained_per_step(one_layer(UniversallyAligned(n_random=1)), monkeypatch, width)
    assert trained == [1 + int(i < width) + int(i < 1) for i in range(WIDTH)]


def test_bc_paths_by_hand():
    choices = GroupChoices("g", 6, (2, 4, 6))
    left, right = BilaterallyCoupled().paths(2, choices)
    assert (left.tolist(), right.tolist()) == ([0, 1], [4, 5])
    # Fig. 2's example: c = (3, 2, 4) with 6 channels per layer has the complement (3, 4, 2).
    assert [BilaterallyCoupled(complement="paper").complement_of(c, choices) for c in (3, 2, 4)] == [3, 4, 2]


@pytest.mark.parametrize(
    "limits",
    [{}, {"min_width": "0.25x"}, {"bins": 4.0}, {"max_width": "1.5x"}, {"min_width": "0.25x", "divisor": 8}],
    ids=str,
)
def test_complements_of_bc_stay_in_the_space(limits):
    """Every choice is the complement of exactly one choice, so narrow and wide ones are trained equally often."""
    graph = trace(create_model("torchvision/mobilenet_v2"))
    space = make_space(graph, **limits)
    for g in space.groups:
        complements = [BilaterallyCoupled().complement_of(c, g) for c in g.options]
        assert sorted(complements) == list(g.options)
        assert [BilaterallyCoupled().complement_of(c, g) for c in complements] == list(g.options)
    even = make_space(graph, k=8, min_width="0.25x").groups[0]
    assert (even.width, even.narrowest) == (32, 8)
    assert [BilaterallyCoupled().complement_of(c, even) for c in even.options] == [40 - c for c in even.options]


def test_the_complement_of_the_paper_leaves_a_space_with_a_narrowest_width():
    graph = trace(create_model("torchvision/mobilenet_v2"))
    space, rng = make_space(graph, min_width="0.25x"), np.random.default_rng(0)
    strategy = BilaterallyCoupled(complement="paper")
    draws = [space.sample(rng) for _ in range(200)]
    outside = [any(strategy.complement_of(w[g.name], g) not in g.options for g in space.groups) for w in draws]
    assert np.mean(outside) > 0.95
    with pytest.raises(OptionError, match="bc knows 'inside' and 'paper'"):
        BilaterallyCoupled(complement="other")


# --- one step against autograd written by hand ------------------------------------------------------------------------


class ByHand:
    """The same network from plain tensors: index the channels, call the functions, differentiate."""

    def __init__(self, model):
        self.p = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

    def __call__(self, x, first, second):
        p, i, j = self.p, torch.as_tensor(first), torch.as_tensor(second)
        x = F.conv2d(x, p["0.weight"][i], padding=1)
        x = F.batch_norm(x, None, None, p["1.weight"][i], p["1.bias"][i], training=True).relu()
        x = F.conv2d(x, p["3.weight"][j][:, i], p["3.bias"][j]).relu()
        # Channels before positions in the flattened vector: channel c owns 9 columns.
        columns = (9 * j[:, None] + torch.arange(9)).flatten()
        return F.linear(x.flatten(1), p["6.weight"][:, columns], p["6.bias"])

    def gradients(self, loss):
        return dict(zip(self.p, torch.autograd.grad(loss, list(self.p.values())), strict=True))


def two_layers(strategy, **options):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 4),
    ).double()
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    nn.init.uniform_(model[1].bias, -0.5, 0.5)
    return make_supernet(model, strategy, example_inputs=batch()[0], **{"k": 4, "min_width": 1, **options})


def drawn(net, seed, n):
    """The widths that a step with this seed draws."""
    rng = net.rng(make_step(seed))
    return [net.space.sample(rng) for _ in range(n)]


def compare(net, expected, tolerance):
    for name, parameter in net.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("complementary", [True, False])
def test_a_bc_step_is_the_mean_of_both_ends_of_the_width_and_of_its_complement(seed, complementary):
    # Eq. 10 and 11: (L_left(c) + L_right(c)) / 2 + (L_left(l - c) + L_right(l - c)) / 2.
    net = two_layers(BilaterallyCoupled(complementary, "paper"))
    images, labels = batch()
    widths = drawn(net, seed, 1)[0]
    vectors = [widths] + [{"0": 8 - widths["0"] or 8, "3": 6 - widths["3"] or 6}] * complementary
    model = ByHand(net.model)
    halves = []
    for c in vectors:
        left = model(images, range(c["0"]), range(c["3"]))
        right = model(images, range(8 - c["0"], 8), range(6 - c["3"], 6))
        halves += [F.cross_entropy(left, labels) / 2, F.cross_entropy(right, labels) / 2]
    shown = net.train_step(make_step(seed, batch=batch()))
    compare(net, model.gradients(sum(halves)), 1e-12)
    assert float(shown) == pytest.approx(float(sum(halves).detach()) / len(vectors), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("distill", [True, False])
def test_a_ua_step_is_the_sandwich_rule_with_inplace_distillation(seed, distill):
    # AutoSlim, section 3.2: the largest learns the labels, the smallest and two random ones its soft output.
    net = two_layers(UniversallyAligned(distill=distill))
    images, labels = batch()
    model = ByHand(net.model)
    teacher = model(images, range(8), range(6))
    losses = [F.cross_entropy(teacher, labels)]
    for c in [{"0": 2, "3": 2}, *drawn(net, seed, 2)]:
        student = model(images, range(c["0"]), range(c["3"]))
        soft = teacher.detach().softmax(1)
        losses.append(-(soft * student.log_softmax(1)).sum(1).mean() if distill else F.cross_entropy(student, labels))
    step = make_step(seed, batch=batch())
    shown = net.train_step(step)
    # The distillation loss works in float32 on purpose; everything else is exact.
    compare(net, model.gradients(sum(losses)), 1e-6 if distill else 1e-12)
    assert float(shown) == pytest.approx(float(losses[0].detach()), abs=1e-12)
    torch.testing.assert_close(step.outputs, teacher.detach(), rtol=0, atol=1e-12)
    assert not step.outputs.requires_grad


def test_distillation_and_labels_give_different_gradients():
    """Or the comparison above would prove nothing."""
    grads = []
    for distill in (True, False):
        net = two_layers(UniversallyAligned(distill=distill))
        net.train_step(make_step(0, batch=batch()))
        grads.append(net.model[6].weight.grad)
    assert (grads[0] - grads[1]).abs().max() > 1e-2


def test_ua_falls_back_to_targets_that_no_soft_output_can_teach():
    net = two_layers(UniversallyAligned(n_random=0))
    images, _ = batch()
    targets = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    model = ByHand(net.model)
    loss = F.mse_loss(model(images, range(8), range(6)), targets) + F.mse_loss(model(images, [0, 1], [0, 1]), targets)
    net.train_step(make_step(0, batch=(images, targets), loss=F.mse_loss))
    compare(net, model.gradients(loss), 1e-12)


@pytest.mark.parametrize(
    ("outputs", "targets", "expected"),
    [
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), True),
        (torch.zeros(3, 4, 5, 5), torch.zeros(3, 5, 5, dtype=torch.long), True),
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.long), False),
        (torch.zeros(3, 4), torch.zeros(3, 4), False),
        (torch.zeros(3, 4), torch.zeros(3), False),
        (torch.zeros(3, 4), torch.zeros(2, dtype=torch.long), False),
        ((torch.zeros(3, 4),), torch.zeros(3, dtype=torch.long), False),
        (torch.zeros(3, 4), [0, 1, 2], False),
        (torch.zeros(3), torch.zeros(3, dtype=torch.long), False),
    ],
)
def test_what_can_be_distilled(outputs, targets, expected):
    assert can_distill(outputs, targets, F.cross_entropy) is expected
    assert can_distill(outputs, targets, cross_entropy(0.1)) is expected
    assert can_distill(outputs, targets, nn.CrossEntropyLoss()) is expected
    # Another loss says something else about the outputs than soft labels do.
    assert not can_distill(outputs, targets, F.multi_margin_loss)


def test_ua_ranges_from_0_15_to_1_5():
    net = two_layers(UniversallyAligned(), min_width="0.15x", max_width="1.5x")
    assert net.space.largest == {"0": 12, "3": 9}
    assert net.space.smallest == {"0": 1, "3": 1}
    assert net.model[0].out_channels == 12
    net.train_step(make_step(0, batch=batch()))
    assert (net.model[0].weight.grad.flatten(1).abs().sum(1) > 0).all()


def test_ua_refuses_a_negative_number_of_random_widths():
    with pytest.raises(OptionError, match="n_random=-1"):
        UniversallyAligned(n_random=-1)


def test_steps_with_other_seeds_draw_other_widths():
    net = two_layers(BilaterallyCoupled())
    assert len({tuple(drawn(net, seed, 1)[0].values()) for seed in range(20)}) > 5


def test_widths_are_drawn_uniformly_and_independently():
    net = two_layers(BilaterallyCoupled())
    rng = np.random.default_rng(0)
    draws = [tuple(net.space.sample(rng).values()) for _ in range(1600)]
    counts = [draws.count(point) for point in sorted(set(draws))]
    # 16 points, 100 each on average; six standard deviations.
    assert len(counts) == 16
    assert all(40 < count < 160 for count in counts)


def test_the_score_of_a_bc_width_is_the_mean_of_both_ends():
    # Eq. 12.
    assert BilaterallyCoupled().combine([0.25, 0.75]) == 0.5
    assert UniversallyAligned().combine([0.25]) == 0.25
