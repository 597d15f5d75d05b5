"""The check by values, which does not trust the rules; and outputs inside objects."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from topologies import ConvBN, Net, PlainChain, point
from torch import nn

from widthkit.trace import trace
from widthkit.trace.rules import RULES

SHAPE = (2, 3, 8, 8)


class Acting(Net):
    """Does something between two layers."""

    def __init__(self, act):
        super().__init__(stem=ConvBN(3, 6), mid=ConvBN(6, 6), tail=ConvBN(6, 5), head=point(5, 4))
        self.act = act

    def forward(self, x):
        return self.head(self.tail(self.act(self.mid(self.stem(x)))))


@pytest.fixture
def wrong_rule(monkeypatch):
    """A plug-in that says ``cumsum`` leaves channels alone."""

    def rule(ctx):
        ctx.set(ctx.out, ctx.dims(ctx.tensors()[0]))

    with monkeypatch.context() as patch:
        patch.setattr(RULES, "names", lambda: ("cumsum",))
        patch.setattr(RULES, "get", lambda name: rule)
        yield


@pytest.mark.usefixtures("wrong_rule")
def test_a_wrong_rule_freezes_the_groups_it_is_wrong_about():
    graph = trace(Acting(lambda x: x.cumsum(1)), SHAPE)
    assert graph.full == {"stem.conv": 6, "tail.conv": 5}
    assert "the outputs change when two of its channels are exchanged" in graph.frozen["mid.conv.weight[0]"]


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x + torch.randn_like(x),
        lambda x: x + torch.rand(x.shape, device=x.device, dtype=x.dtype),
        lambda x: F.dropout(x, 0.5, training=True),
        lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
        lambda x: x.float().relu(),
    ],
)
def test_noise_and_types_are_no_wrong_groups(act):
    graph = trace(Acting(act), SHAPE)
    assert graph.full == {"stem.conv": 6, "mid.conv": 6, "tail.conv": 5}
    assert not any("not checked" in note for note in graph.notes)


def test_widths_of_free_outputs_are_checked_too():
    model = Acting(torch.relu)
    assert trace(model, SHAPE, free_outputs=True).full == {"stem.conv": 6, "mid.conv": 6, "tail.conv": 5, "head": 4}


class Pair(nn.Module):
    """Returns which class has the largest score, and the scores."""

    def __init__(self):
        super().__init__()
        self.net = PlainChain()

    def forward(self, x):
        y = self.net(x)
        return y, y.mean((2, 3)).argmax(1)


def test_integer_outputs_are_compared():
    graph = trace(Pair(), SHAPE)
    assert graph.full == {"net.stem.conv": 6, "net.mid.conv": 8}
    assert not graph.notes


def test_what_could_not_be_checked_is_noted():
    graph = trace(Acting(lambda x: (x * 1e200) * 1e200), SHAPE)
    assert any("not checked by exchanging channels" in note for note in graph.notes)


# --- outputs inside objects -------------------------------------------------------------------------------------------


class Plain:
    def __init__(self, logits):
        self.logits = logits


class Slotted:
    __slots__ = ("logits", "missing")

    def __init__(self, logits):
        self.logits = logits


class Wrapped(PlainChain):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(super().forward(x))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: types.SimpleNamespace(logits=y),
        Plain,
        Slotted,
        lambda y: [Plain({"deep": Slotted(y)})],
        lambda y: (part for part in [y]),
        lambda y: iter([y]),
        lambda y: {y},
        lambda y: torch.distributions.Normal(y, torch.ones_like(y), validate_args=False),
    ],
)
def test_tensors_in_objects_are_outputs(wrap):
    graph = trace(Wrapped(wrap), SHAPE)
    assert graph.full == {"stem.conv": 6, "mid.conv": 8}
    assert graph.frozen["head.weight[0]"].startswith("model output")


def test_what_cannot_be_looked_into_is_noted():
    graph = trace(Wrapped(lambda y: (y, object())), SHAPE)
    assert "the outputs hold a builtins.object, which the trace cannot look into" in graph.notes
