"""Training with a teacher: what is learned, how often the teacher runs, what stays as it was, what is refused."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from widthkit_plugins.strategies.ua import UniversallyAligned

import widthkit as wk
from widthkit.errors import CheckpointError, ModelError, OptionError
from widthkit.export.joint import JointNet
from widthkit.supernet import make_supernet
from widthkit.supernet.strategy import STRATEGIES, StepCost, train_path
from widthkit.testing import make_step, small_batch, small_graph, small_net

BATCHES = [small_batch(seed) for seed in range(3)]
NAMES = sorted(info.name for info in STRATEGIES.infos())
QUIET = {"device": "cpu", "progress": False}
PLAIN = {"momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "clip_grad": None, "optimizer": "momentum"}
"""Plain gradient descent."""


def trained_net(seed=5):
    """A teacher in training mode, with running statistics of its own."""
    net = small_net(seed)
    for images, _ in BATCHES:
        net(images)
    return net


def build(strategy, **options):
    return make_supernet(small_net(), strategy, graph=small_graph(), k=4, **options)


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def attention(features):
    maps = features.square().sum(1).flatten(1)
    return maps / maps.square().sum(1, keepdim=True).sqrt()


# --- what is learned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_an_update_is_that_of_the_formula(weight):
    net, teacher, (images, labels) = small_net(), trained_net(), BATCHES[0]
    reference, wise = copy.deepcopy(net).train(), copy.deepcopy(teacher).eval()
    options = {"teacher_weight": weight, "temperature": 3.0, "lr": 0.1, **PLAIN}
    result = wk.train(net, [BATCHES[0]], 1, teacher=teacher, **options, **QUIET)
    outputs, said = reference(images), wise(images).detach()
    p, q = (said / 3).softmax(1), (outputs / 3).softmax(1)
    soft = 9 * (p * (p.log() - q.log())).sum(1).mean()
    total = (1 - weight) * F.cross_entropy(outputs, labels) + weight * soft
    total.backward()
    for parameter, expected in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected - 0.1 * expected.grad, rtol=0, atol=1e-12)
    assert result.loss == pytest.approx(total.item(), abs=1e-12)


def test_who_agrees_with_the_teacher_learns_nothing_from_it():
    class Head(nn.Linear):
        """Without batch norm training mode computes what eval mode does."""

    torch.manual_seed(0)
    net = Head(3, 4).double()
    teacher = copy.deepcopy(net)
    batch = torch.randn(5, 3, dtype=torch.float64), torch.randint(0, 4, (5,))
    result = wk.train(net, [batch], 1, teacher=teacher, teacher_weight=1.0, lr=1.0, **PLAIN, **QUIET)
    assert result.loss == pytest.approx(0, abs=1e-14)
    assert all((p - q).abs().max() < 1e-14 for p, q in zip(net.parameters(), teacher.parameters(), strict=True))


@pytest.mark.parametrize("strategy", [None, *NAMES])
def test_without_weight_a_teacher_changes_no_bit(strategy):
    ours, plain = (small_net() if strategy is None else build(strategy) for _ in range(2))
    first = wk.train(ours, BATCHES, 2, teacher=trained_net(), teacher_weight=0.0, **QUIET)
    second = wk.train(plain, BATCHES, 2, **QUIET)
    assert same_state(ours, plain)
    assert [entry["loss"] for entry in first.history] == [entry["loss"] for entry in second.history]


def test_mixed_labels_and_dictionaries_of_maps():
    """A segmentation network of torchvision's kind, and labels as probabilities."""

    class Segmenting(nn.Module):
        def __init__(self, key):
            super().__init__()
            self.key, self.conv = key, nn.Conv2d(3, 4, 1).double()

        def forward(self, x):
            maps = self.conv(x)
            return {self.key: maps, "aux": maps.mean()} if self.key else maps

    images = BATCHES[0][0]
    labels = torch.rand(len(images), 4, *images.shape[2:], dtype=torch.float64).softmax(1)
    net, teacher = Segmenting("out"), Segmenting("")
    reference, options = copy.deepcopy(net), {"teacher_weight": 0.5, "temperature": 2.0, "lr": 0.1, **PLAIN}
    wk.train(net, [(images, labels)], 1, teacher=teacher, **options, **QUIET)
    outputs, said = reference(images)["out"], teacher(images).detach()
    p, q = (said / 2).softmax(1), (outputs / 2).softmax(1)
    (0.5 * F.cross_entropy(outputs, labels) + 2 * (p * (p / q).log()).sum(1).mean()).backward()
    expected = reference.conv.weight - 0.1 * reference.conv.weight.grad
    torch.testing.assert_close(net.conv.weight, expected, rtol=0, atol=1e-12)


def test_a_teacher_teaches():
    """Without any label the network learns to say what the teacher says."""
    net, teacher = small_net(), trained_net().eval()
    nonsense = [(images, torch.zeros_like(labels)) for images, labels in BATCHES]

    def agreement():
        with torch.no_grad():
            return sum(F.mse_loss(net(x).softmax(1), teacher(x).softmax(1)).item() for x, _ in BATCHES)

    before = agreement()
    wk.train(net, nonsense, 30, teacher=teacher, teacher_weight=1.0, lr=0.05, **QUIET)
    assert agreement() < before / 4


# --- feature maps -----------------------------------------------------------------------------------------------------


class ChannelsLast(nn.Module):
    """A convolution whose outputs are normalised with channels in the last place."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm, self.head = nn.Conv2d(3, 5, 3), nn.LayerNorm(5), nn.Linear(5, 4)
        self.double()

    def forward(self, x):
        return self.head(self.norm(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.mark.parametrize(
    ("net", "teacher", "place"), [(small_net(), trained_net(), "top"), (ChannelsLast(0), ChannelsLast(1), "conv")]
)
def test_attention_is_matched_where_the_formula_says(net, teacher, place):
    """All maps of these networks have one size, so the last module with such a map counts."""
    images, labels = BATCHES[0]
    reference, wise, maps = copy.deepcopy(net).train(), copy.deepcopy(teacher).eval(), []
    for model in (reference, wise):
        model.get_submodule(place).register_forward_hook(lambda module, args, out: maps.append(out))
    options = {"teacher_weight": 0.0, "feature_weight": 100.0, "lr": 0.1, **PLAIN}
    wk.train(net, [BATCHES[0]], 1, teacher=teacher, **options, **QUIET)
    outputs = reference(images)
    wise(images)
    distance = (attention(maps[0]) - attention(maps[1].detach())).square().mean() / 2
    (F.cross_entropy(outputs, labels) + 100 * distance).backward()
    for parameter, expected in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected - 0.1 * expected.grad, rtol=0, atol=1e-12)
    assert not any(module._forward_hooks for module in net.modules())


@dataclass(frozen=True)
class OnlyOne(UniversallyAligned):
    """Trains the narrowest network alone."""

    def train_step(self, net, step):
        return train_path(net, step, net.paths(net.space.smallest)[0])

    @property
    def cost(self):
        return StepCost(1, 1)


@pytest.mark.parametrize("feature_weight", [0.0, 100.0])
def test_a_sub_network_learns_what_its_export_learns(feature_weight):
    net = build(OnlyOne())
    widths = net.space.smallest
    slim = wk.export(net, widths)
    options = {"teacher_weight": 0.5, "feature_weight": feature_weight, "lr": 0.1, **PLAIN}
    for one in (net, slim):
        wk.train(one, [BATCHES[0]], 1, teacher=trained_net(), **options, **QUIET)
    for (name, parameter), expected in zip(wk.export(net, widths).named_parameters(), slim.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-12, msg=name)


# --- supernets --------------------------------------------------------------------------------------------------------

SEEN = []


class Watched(nn.Module):
    """Notes how it is run; notes of its copies come here too."""

    def __init__(self):
        super().__init__()
        self.net = trained_net()

    def forward(self, x):
        SEEN.append((self.training, torch.is_grad_enabled(), x.sum().item()))
        return self.net(x)


@pytest.mark.parametrize("strategy", NAMES)
def test_a_teacher_runs_once_per_batch_and_records_stay_losses_on_labels(strategy):
    SEEN.clear()
    taught, plain = build(strategy), build(strategy)
    wk.train(taught, BATCHES[:1], 1, teacher=Watched(), **QUIET)
    wk.train(plain, BATCHES[:1], 1, **QUIET)
    assert not same_state(taught.model, plain.model)
    # Both have seen one batch, with the same weights.
    assert taught.width_history.records == plain.width_history.records
    # Once to see whether it fits, and once in the only step.
    run = (False, False, BATCHES[0][0].sum().item())
    assert [*SEEN] == [run, run]
    SEEN.clear()
    wk.train(build(strategy), BATCHES, 2, teacher=Watched(), **QUIET)
    assert len(SEEN) == 1 + 2 * len(BATCHES)


@pytest.mark.parametrize("strategy", NAMES)
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_every_strategy_learns_from_a_teacher_and_its_maps(strategy, mixed_precision):
    net = build(strategy)
    options = {"feature_weight": 10.0, "lr": 0.01, "mixed_precision": mixed_precision}
    batches = [(images, torch.nn.functional.one_hot(labels, 4).double()) for images, labels in BATCHES]
    for loader in (BATCHES, batches):
        result = wk.train(net, loader, 2, teacher=trained_net(), **options, **QUIET)
        assert np.isfinite(result.loss)


@pytest.mark.parametrize(("options", "taught"), [({}, 1), ({"distill": False}, 4)])
def test_where_the_widest_network_teaches_it_alone_has_the_teacher(options, taught):
    net, heard = build(UniversallyAligned(**options)), []

    def teacher(outputs, loss):
        heard.append(outputs)
        return loss

    step = make_step(teacher=teacher)
    net.train_step(step)
    assert len(heard) == taught
    torch.testing.assert_close(heard[0], step.outputs)


@pytest.mark.parametrize("distill", [True, False])
def test_networks_that_are_trained_jointly(distill):
    joints = []
    for options in ({}, {"teacher": trained_net(), "feature_weight": 10.0}):
        net = build("ua")
        joints.append(JointNet(net, [net.space.largest, net.space.smallest], distill=distill))
        wk.train(joints[-1], BATCHES, 1, **options, **QUIET)
    assert not same_state(*joints)


def test_a_supernet_teaches():
    supernet = build("bc").set_widths(dict.fromkeys(small_graph().group_names, 2))
    slim = wk.export(supernet)
    nets = []
    for teacher in (supernet, slim):
        nets.append(small_net())
        wk.train(nets[-1], BATCHES, 1, teacher=teacher, **QUIET)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


# --- what stays as it was ---------------------------------------------------------------------------------------------


def test_the_teacher_stays_as_it_is_even_if_it_is_the_student():
    teacher = trained_net()
    teacher.stem.eval()
    before, flags = copy.deepcopy(teacher), [module.training for module in teacher.modules()]
    wk.train(small_net(), BATCHES, 1, teacher=teacher, **QUIET)
    assert same_state(teacher, before)
    assert flags == [module.training for module in teacher.modules()]
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    # What a network knew before is a teacher like any other.
    ours, truth = trained_net(), trained_net()
    wk.train(ours, BATCHES, 1, teacher=ours, **QUIET)
    wk.train(truth, BATCHES, 1, teacher=before, **QUIET)
    assert same_state(ours, truth)


def test_a_teacher_that_writes_into_the_batch_writes_into_a_copy():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = trained_net()

        def forward(self, x):
            return self.net(x.mul_(0).add_(1))

    images, labels = BATCHES[0]
    before = images.clone()
    wk.train(small_net(), [(images, labels)], 1, teacher=Writing(), **QUIET)
    assert torch.equal(images, before)


# --- going on ---------------------------------------------------------------------------------------------------------


class Kill(Exception):
    pass


def interrupted(out):
    def kill(entry):
        raise Kill

    with pytest.raises(Kill):
        wk.train(small_net(), BATCHES, 3, teacher=trained_net(), feature_weight=1.0, out=out, on_epoch=kill, **QUIET)


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path):
    interrupted(tmp_path)
    options = {"teacher": trained_net(), "feature_weight": 1.0, **QUIET}
    whole, resumed = small_net(), small_net(9)
    wk.train(whole, BATCHES, 3, **options)
    wk.train(resumed, BATCHES, 3, out=tmp_path, resume=True, **options)
    assert same_state(whole, resumed)


@pytest.mark.parametrize("other", ["none", "one weight", "one setting"])
def test_a_run_is_not_resumed_with_another_teacher(tmp_path, other):
    interrupted(tmp_path)
    teacher = trained_net()
    if other == "one weight":
        with torch.no_grad():
            teacher.head.bias[0] += 1e-9
    elif other == "one setting":
        teacher.stem[1].eps *= 2
    net = small_net()
    before = copy.deepcopy(net)
    teacher = None if other == "none" else teacher
    with pytest.raises(CheckpointError, match="is of a run with teacher="):
        wk.train(net, BATCHES, 3, teacher=teacher, feature_weight=1.0, out=tmp_path, resume=True, **QUIET)
    assert same_state(net, before)


# --- refusals ---------------------------------------------------------------------------------------------------------


class Ignoring(nn.Linear):
    def train_step(self, step):
        loss = step.loss(self(step.inputs), step.targets)
        step.backward(loss)
        return loss.detach()


class Late(nn.Module):
    """Asks the teacher about its first outputs after it has run again."""

    def __init__(self):
        super().__init__()
        self.net = small_net()

    @property
    def model(self):
        return self.net

    def forward(self, x):
        return self.net(x)

    def train_step(self, step):
        outputs, _ = self(step.inputs), self(step.inputs)
        loss = step.loss(outputs, step.targets)
        step.backward(step.with_teacher(outputs, loss))
        return loss.detach()


def other_classes():
    torch.manual_seed(0)
    net = trained_net()
    net.head = nn.Linear(6, 7).double()
    return net


def broken():
    net = trained_net()
    nn.init.constant_(net.head.bias, float("inf"))
    return net


def other_names():
    return nn.Sequential(trained_net())


FLAT = (torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))
REGRESSION = (BATCHES[0][0], torch.full((len(BATCHES[0][0]), 4), 2.0, dtype=torch.float64))
REFUSALS = {
    "no module": (small_net, "weights.pth", BATCHES[0], {}, "teacher must be a module, not str"),
    "other classes": (small_net, other_classes, BATCHES[0], {}, r"not \(8, 4\) of the network and \(8, 7\)"),
    "other inputs": (small_net, lambda: nn.Linear(3, 4).double(), BATCHES[0], {}, "the teacher cannot run on a batch"),
    "regression": (small_net, trained_net, REGRESSION, {"loss": F.mse_loss}, "the targets are other numbers"),
    "not finite": (small_net, broken, BATCHES[0], {}, "the teacher's outputs are not finite"),
    "ignoring": (lambda: Ignoring(3, 2), lambda: nn.Linear(3, 2), FLAT, {}, "Ignoring does not learn from a teacher"),
    "no maps": (small_net, other_names, BATCHES[0], {"feature_weight": 1.0}, "no module of the network"),
    "late": (Late, trained_net, BATCHES[0], {"feature_weight": 1.0}, "of the last run only"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused_before_a_weight_changes(case):
    make, teacher, batch, options, text = REFUSALS[case]
    net = make()
    before = copy.deepcopy(net)
    with pytest.raises((ModelError, OptionError), match=text) as caught:
        wk.train(net, [batch], 1, teacher=teacher if isinstance(teacher, str) else teacher(), **options, **QUIET)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before.parameters(), strict=True))
    if case != "late":  # It is known only after the network has run in training mode.
        assert same_state(net, before)
    assert not any(module._forward_hooks for module in net.modules())
