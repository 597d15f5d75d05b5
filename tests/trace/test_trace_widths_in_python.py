"""Models that compute with their own widths, or decide by them: whatever is exported does what the model does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from topologies import ConvBN, Net, point, randomised
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import oracles
from widthkit.export.dense import export
from widthkit.trace import trace

SHAPE = (2, 3, 8, 8)


class Names(TorchDispatchMode):
    """The operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operators(model: nn.Module, x: torch.Tensor) -> list[str]:
    with torch.inference_mode(), Names() as names:
        model(x)
    return names.found


def check_every_width(model: nn.Module) -> dict[str, int]:
    """Export many widths, equal ones among them; each runs the operators of the model. Return the groups."""
    randomised(model)
    graph, x = trace(model, SHAPE), torch.randn(SHAPE, dtype=torch.float64)
    rng, expected = np.random.default_rng(0), operators(model, x)
    oracles.check_permutation(model, graph, x, rng, each=True)
    equal = [{name: min(width, full) for name, full in graph.full.items()} for width in range(1, 17)]
    for widths in [*equal, *(oracles.random_units(graph, rng) for _ in range(10))]:
        assert operators(export(model, widths, graph=graph), x) == expected, widths
    return graph.full


class Deciding(Net):
    """Runs something, or not, after a look at its widths."""

    def __init__(self, decide, a=6, b=8):
        super().__init__(stem=ConvBN(3, a), mid=ConvBN(a, b), head=point(b, 4))
        self.decide = decide

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.decide(self, x, self.mid(x)))


def add_if_shapes_agree(_, x, y):
    return y + x if y.shape == x.shape else y


def add_if_attributes_agree(net, x, y):
    return y + x if net.mid.conv.in_channels == net.mid.conv.out_channels else y


def add_if_stored_widths_agree(net, x, y):
    return y + x if net.widths[0] == net.widths[1] else y


def squash_if_wide(_, x, y):
    return y.tanh() if y.shape[1] > 4 else y


def squash_if_even(_, x, y):
    return y.tanh() if y.size(1) % 2 == 0 else y


def scale_for_every_channel(_, x, y):
    for _ in range(y.shape[1]):
        y = y * 1.01
    return y


def scale_by_width(_, x, y):
    return y * y.shape[1] ** -0.5


@pytest.mark.parametrize(
    ("decide", "full"),
    [
        # The wider one is fixed, so that the narrower one can never be as wide.
        (add_if_shapes_agree, {"stem.conv": 6}),
        (add_if_attributes_agree, {"stem.conv": 6}),
        (squash_if_wide, {"stem.conv": 6}),
        (squash_if_even, {"stem.conv": 6}),
        (scale_for_every_channel, {"stem.conv": 6}),
        (scale_by_width, {"stem.conv": 6, "mid.conv": 8}),
    ],
)
def test_what_a_comparison_decided_holds_at_every_width(decide, full):
    assert check_every_width(Deciding(decide)) == full


def test_equal_shapes_that_are_tied_stay_free():
    assert check_every_width(Deciding(add_if_shapes_agree, 8, 8)) == {"stem.conv": 8}


def test_stored_widths_that_nothing_changes_decide_the_same():
    model = Deciding(add_if_stored_widths_agree)
    model.widths = [6, 8]
    assert check_every_width(model) == {"stem.conv": 6, "mid.conv": 8}


def test_the_reason_names_the_operators():
    graph = trace(Deciding(squash_if_wide), SHAPE)
    assert "which operators run depends on widths: 'conv2d' instead of 'tanh'" in graph.frozen["mid.conv.weight[0]"]


class Parts(Net):
    """Two parts of computed sizes, each with its own layer."""

    def __init__(self, size):
        n = size(16)
        super().__init__(stem=ConvBN(3, 16), a=ConvBN(n, 6), b=ConvBN(16 - n, 5), head=point(11, 4))
        self.size = size

    def forward(self, x):
        x = self.stem(x)
        n = self.size(x.shape[1])
        return self.head(torch.cat([self.a(x[:, :n]), self.b(x[:, n:])], 1))


class Activations(Parts):
    """Two parts of computed sizes that no layer tells apart."""

    def __init__(self, size):
        super().__init__(size)
        self.a = ConvBN(16, 11)
        del self.b

    def forward(self, x):
        x = self.stem(x)
        n = self.size(x.shape[1])
        return self.head(self.a(torch.cat([x[:, :n].sin(), x[:, n:].tanh()], 1)))


SIZES = {
    "times 0.5": lambda c: int(c * 0.5),
    "0.25 times": lambda c: int(0.25 * c),
    "divided": lambda c: int(c / 2),
    "rounded": lambda c: round(c / 3),
    "floor": lambda c: math.floor(c / 2),
    "ceil": lambda c: math.ceil(c / 4),
    "root": lambda c: int(math.sqrt(c)),
    "divmod": lambda c: divmod(c, 3)[0],
    "at least": lambda c: max(c // 4, 3),
    "untraced": lambda c: int(c) // 2,
}


@pytest.mark.parametrize("kind", [Parts, Activations])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_that_cannot_be_followed_freeze(kind, size):
    assert "stem.conv" not in check_every_width(kind(SIZES[size]))


@pytest.mark.parametrize("kind", [Parts, Activations])
def test_shifts_are_followed(kind):
    assert check_every_width(kind(lambda c: c >> 1))["stem.conv"] == 8


class Counted(Net):
    """Cuts a bias by its number of elements, as Swin V2 does."""

    def __init__(self):
        super().__init__(stem=ConvBN(3, 6), mid=nn.Linear(6, 9), head=nn.Linear(9, 4))

    def forward(self, x):
        bias = self.mid.bias.clone()
        third = bias.numel() // 3
        bias[third : 2 * third].zero_()
        y = nn.functional.linear(self.stem(x).mean((2, 3)), self.mid.weight, bias)
        return self.head(y.sin())


def test_the_number_of_elements_is_followed():
    assert check_every_width(Counted()) == {"stem.conv": 6, "mid": 3}


class Remembering(Net):
    """Runs other operators in its second call, as models do that keep tables."""

    def __init__(self):
        super().__init__(stem=ConvBN(3, 6), mid=ConvBN(6, 8), head=point(8, 4))
        self.table = {}

    def forward(self, x):
        if x.device not in self.table:
            self.table[x.device] = torch.ones((), device=x.device, dtype=x.dtype).neg()
        return self.head(self.mid(self.stem(x) * self.table[x.device]))


def test_a_model_that_keeps_tables_stays_searchable():
    assert trace(Remembering(), SHAPE).full == {"stem.conv": 6, "mid.conv": 8}
