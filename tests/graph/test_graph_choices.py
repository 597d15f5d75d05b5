"""Search spaces: which widths a group may take."""

import math
from fractions import Fraction
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from widthkit.errors import OptionError, WidthsError
from widthkit.graph.space import SearchSpace, bin_sizes, flops_bins, make_space, resolve_limit, uniform_space
from widthkit.modules.models import create_model
from widthkit.trace import trace


@cache
def three_layers():
    """Widths 7, 24 and 40: one prime, one even, one that divides by 8."""
    model = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 24, 3), nn.Conv2d(24, 40, 1), nn.Conv2d(40, 4, 1))
    return trace(model, (1, 3, 8, 8))


limits = st.one_of(
    st.integers(1, 60),
    st.floats(0.05, 2.0),
    st.floats(0.05, 2.0).map(lambda ratio: f"{ratio}x"),
)


def check(space, min_width, max_width, divisor):
    for group, (name, width) in zip(space.groups, three_layers().full.items(), strict=True):
        low, high = resolve_limit(min_width, width), resolve_limit(max_width, width)
        assert (group.name, group.width) == (name, width)
        assert all(a < b for a, b in pairwise(group.options))
        assert all(low <= option <= high for option in group.options)
        assert group.widest == high
        assert all(option % divisor == 0 or option == high for option in group.options)
        if low % divisor == 0 and min_width != 1:
            assert group.narrowest == low
    assert space.size == math.prod(len(g.options) for g in space.groups)


@given(k=st.integers(1, 60), divisor=st.integers(1, 16), min_width=limits, max_width=limits)
@settings(max_examples=300, deadline=None)
def test_uniform_spaces(k, divisor, min_width, max_width):
    ranges = [(resolve_limit(min_width, w), resolve_limit(max_width, w)) for w in three_layers().full.values()]
    if any(low > high for low, high in ranges):
        with pytest.raises(OptionError, match=r"min_width=.* exceeds max_width"):
            uniform_space(three_layers(), k, min_width=min_width, max_width=max_width, divisor=divisor)
        return
    space = uniform_space(three_layers(), k, min_width=min_width, max_width=max_width, divisor=divisor)
    check(space, min_width, max_width, divisor)
    assert all(len(g.options) <= k + 3 for g in space.groups)


@given(beta=st.floats(0.01, 100), divisor=st.integers(1, 16), min_width=limits, max_width=st.floats(1.0, 2.0))
@settings(max_examples=200, deadline=None)
def test_bin_spaces(beta, divisor, min_width, max_width):
    ranges = [(resolve_limit(min_width, w), resolve_limit(max_width, w)) for w in three_layers().full.values()]
    if any(low > high for low, high in ranges):
        return
    space = flops_bins(three_layers(), beta, min_width=min_width, max_width=max_width, divisor=divisor)
    check(space, min_width, max_width, divisor)


@given(k=st.integers(1, 12), seed=st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_encode_and_decode_undo_each_other(k, seed):
    space = uniform_space(three_layers(), k, max_width="1.5x", own_width=True)
    rng = np.random.default_rng(seed)
    widths = space.sample(rng)
    genes = space.encode(widths)
    assert space.decode(genes) == widths
    assert genes.tolist() == [g.options.index(widths[g.name]) for g in space.groups]
    drawn = [int(rng.integers(len(g.options))) for g in space.groups]
    assert space.encode(space.decode(drawn)).tolist() == drawn


def test_k_choices_are_evenly_spaced():
    # AutoSlim, section 3.2; BCNet, section 3: l / K times 1 to K.
    space = uniform_space(three_layers(), 8)
    assert [g.options for g in space.groups] == [
        (1, 2, 3, 4, 5, 6, 7),
        (3, 6, 9, 12, 15, 18, 21, 24),
        (5, 10, 15, 20, 25, 30, 35, 40),
    ]
    assert uniform_space(three_layers(), 1).size == 1
    assert uniform_space(three_layers(), 1).largest == three_layers().full


def test_the_range_of_autoslim():
    space = uniform_space(three_layers(), 10, min_width="0.15x", max_width="1.5x")
    assert space.largest == {"0": 10, "2": 36, "3": 60}
    assert space.smallest == {"0": 1, "2": 4, "3": 6}
    assert space.groups[1].options == (4, 7, 11, 14, 18, 22, 25, 29, 32, 36)


def test_a_grown_space_has_the_models_width_where_it_is_asked_for():
    # 1.5 times 24 units in 10 steps of 3.6: the model's 24 lies between 21.6 and 25.2.
    options = {"k": 10, "max_width": "1.5x"}
    assert uniform_space(three_layers(), **options).groups[1].options == (4, 7, 11, 14, 18, 22, 25, 29, 32, 36)
    asked = uniform_space(three_layers(), **options, own_width=True).groups[1].options
    assert asked == (4, 7, 11, 14, 18, 22, 24, 25, 29, 32, 36)
    binned = make_space(three_layers(), bins=4.0, max_width="1.5x", own_width=True)
    assert all(g.width in g.options for g in binned.groups)


def test_a_divisor():
    space = uniform_space(three_layers(), 20, divisor=8)
    assert [g.options for g in space.groups] == [(7,), (8, 16, 24), (8, 16, 24, 32, 40)]
    grown = uniform_space(three_layers(), 20, divisor=8, max_width="1.25x")
    assert [g.options for g in grown.groups] == [(8, 9), (8, 16, 24, 30), (8, 16, 24, 32, 40, 48, 50)]


def test_mobilenet_v2_has_the_space_of_the_paper():
    # BCNet, section 3: 10 ** 25 for 25 layers with 10 choices each.
    graph = trace(create_model("torchvision/mobilenet_v2"))
    assert len(graph.group_names) == 25
    assert uniform_space(graph, 10).size == 10**25
    assert uniform_space(graph, 20).size == 16 * 20**24  # its narrowest layer has 16 channels


def test_bins_by_hand():
    # CafeNet, Eq. 7 to 9. On 8 x 8 images without padding the outputs are 6 x 6, 4 x 4, 4 x 4, 4 x 4.
    e = [
        3 * 9 * 36 + 9 * 24 * 16,  # 972 + 3456 = 4428
        7 * 9 * 16 + 40 * 16,  # 1008 + 640 = 1648
        24 * 16 + 4 * 16,  # 384 + 64 = 448
    ]
    assert three_layers().sensitivity().tolist() == e
    sizes = [1, 3, 10]  # 1, 4428 / 1648 = 2.7, 4428 / 448 = 9.9
    assert bin_sizes(three_layers()).tolist() == sizes
    assert [g.options for g in flops_bins(three_layers()).groups] == [
        (1, 2, 3, 4, 5, 6, 7),
        (3, 6, 9, 12, 15, 18, 21, 24),
        (10, 20, 30, 40),
    ]
    assert bin_sizes(three_layers(), 2.0).tolist() == [2, 5, 20]
    assert bin_sizes(three_layers(), 1000.0).tolist() == [7, 24, 40]
    assert bin_sizes(three_layers(), 0.01).tolist() == [1, 1, 1]


def test_bins_of_a_grown_space_are_those_at_its_widest():
    # At twice the widths, 14, 48 and 80: what one more channel costs is what it writes and what reads it there.
    e = [3 * 9 * 36 + 9 * 48 * 16, 14 * 9 * 16 + 80 * 16, 48 * 16 + 4 * 16]
    sizes = [1, round(e[0] / e[1]), round(e[0] / e[2])]
    assert sizes == [1, 2, 9]  # [1, 3, 10] at the model's width
    grown = flops_bins(three_layers(), max_width="2x")
    assert [g.options[0] for g in grown.groups] == sizes
    assert [len(g.options) for g in grown.groups] == [14, 24, 9]
    half = flops_bins(three_layers(), max_width="0.5x")
    at_half = [3 * 9 * 36 + 9 * 12 * 16, 4 * 9 * 16 + 20 * 16, 12 * 16 + 4 * 16]
    assert [g.options[0] for g in half.groups] == [1, round(at_half[0] / at_half[1]), round(at_half[0] / at_half[2])]


def test_bins_of_one_layer_cost_about_the_same():
    """A bin of any group is worth the sensitivity of the most expensive channel, up to rounding."""
    graph = trace(create_model("torchvision/mobilenet_v2"))
    sizes, slope = bin_sizes(graph, 4.0), graph.sensitivity()
    inner = (sizes > 1) & (sizes < graph.group_widths)
    assert inner.sum() > 15
    worth = sizes[inner] * slope[inner] / slope.max() / 4.0
    assert ((worth > 0.85) & (worth < 1.15)).all()


def test_a_group_without_macs_is_one_bin():
    class Free:
        group_widths = np.array([6, 4])

        def __init__(self, slope):
            self.slope = np.array(slope)

        def sensitivity(self, widths=None):
            return self.slope

    assert bin_sizes(Free([10.0, 0.0])).tolist() == [1, 4]
    assert bin_sizes(Free([0.0, 0.0])).tolist() == [6, 4]


def test_narrower():
    space = uniform_space(three_layers(), 4)
    widths = space.largest
    assert space.narrower(widths, "2") == {"0": 7, "2": 18, "3": 40}
    assert widths == space.largest
    assert space.narrower(space.smallest, "2") is None
    for name in space.names:
        steps, now = 0, space.largest
        while (after := space.narrower(now, name)) is not None:
            now, steps = after, steps + 1
        assert steps == len(space.groups[space.names.index(name)].options) - 1
        assert now == {**space.largest, name: space.smallest[name]}


def test_fixed_groups_keep_their_width():
    space = uniform_space(three_layers(), 5, fixed={"2": 17})
    assert [g.options for g in space.groups][1] == (17,)
    assert space.largest["2"] == space.smallest["2"] == 17
    assert uniform_space(three_layers(), 5, fixed={"2": 24}, max_width="0.5x").largest["2"] == 24
    assert uniform_space(three_layers(), 5, fixed={"2": np.int64(36)}, max_width="1.5x").largest["2"] == 36


@pytest.mark.parametrize("width", [0, -1, 25, 1.5, "8", True, None])
def test_fixed_widths_that_a_group_cannot_have(width):
    with pytest.raises(WidthsError, match=r"group '2': fixed width .* from 1 to 24"):
        uniform_space(three_layers(), 5, fixed={"2": width})


@pytest.mark.parametrize(
    ("limit", "width", "units"),
    [
        (8, 64, 8),
        (96, 64, 64),
        ("8", 64, 8),
        ("96", 64, 64),
        (1.0, 64, 64),
        (0.15, 64, 10),
        (0.001, 64, 1),
        ("0.15x", 64, 10),
        (" 1.5x ", 64, 96),
        ("0.5", 64, 32),
        ("2x", 64, 128),
        (1, 64, 1),
        ("1x", 64, 64),
    ],
)
def test_limits(limit, width, units):
    assert resolve_limit(limit, width) == units


@pytest.mark.parametrize("limit", [0, -3, 0.0, -0.5, "0x", "-1x", math.nan, math.inf, "infx", "nanx", "wide", "", "x"])
def test_limits_that_make_no_sense(limit):
    with pytest.raises(OptionError, match="width limit"):
        resolve_limit(limit, 64)


@pytest.mark.parametrize("options", [{"k": 0}, {"k": -1}, {"divisor": 0}, {"min_width": "0.9x", "max_width": "0.5x"}])
def test_uniform_spaces_that_make_no_sense(options):
    with pytest.raises(OptionError, match=r"k=|divisor=|exceeds max_width"):
        uniform_space(three_layers(), **options)


@pytest.mark.parametrize("beta", [0, -1.0, math.nan, math.inf])
def test_bin_sizes_that_make_no_sense(beta):
    with pytest.raises(OptionError, match="beta="):
        flops_bins(three_layers(), beta)


def test_unknown_groups_are_named_with_what_is_close():
    with pytest.raises(WidthsError, match="unknown channel group '22': did you mean 2"):
        uniform_space(three_layers(), fixed={"22": 4})
    space = uniform_space(three_layers(), 4)
    with pytest.raises(WidthsError, match="unknown channel group 'zzz'"):
        space.encode({**space.largest, "zzz": 3})
    with pytest.raises(WidthsError, match=r"group '2': width 5 is not among the choices \[6, 12, 18, 24\]"):
        space.encode({"2": 5})


def test_encode_takes_the_models_width_for_groups_that_are_not_named():
    space = uniform_space(three_layers(), 4)
    assert space.decode(space.encode({"2": 6})) == {"0": 7, "2": 6, "3": 40}


def test_sampling_reaches_every_choice_and_repeats():
    space = uniform_space(three_layers(), 4)
    draws = [space.sample(np.random.default_rng(seed)) for seed in range(200)]
    assert [{d[g.name] for d in draws} for g in space.groups] == [set(g.options) for g in space.groups]
    assert draws == [space.sample(np.random.default_rng(seed)) for seed in range(200)]
    assert all(type(width) is int for d in draws for width in d.values())


def test_a_space_is_frozen():
    space = uniform_space(three_layers(), 4)
    with pytest.raises(AttributeError):
        space.divisor = 2
    assert isinstance(space, SearchSpace)
    assert Fraction(space.size) == 4**3
