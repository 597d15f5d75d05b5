"""Sizes of search spaces that the papers state, options that work together, and the command that shows them."""

import itertools
import json
import math
from functools import cache

import numpy as np
import pytest
from command import here
from torch import nn

import widthkit as wk
from widthkit.budget import parse_budget
from widthkit.graph.space import SearchSpace, bin_sizes, flops_bins, make_space, uniform_space
from widthkit.report.space import draw_space, show_size, space_json
from widthkit.run.stage_plan import StagePlan
from widthkit.supernet.strategy import make_strategy
from widthkit.testing import small_graph
from widthkit.trace import trace


@cache
def mobilenet():
    return trace(wk.create_model("torchvision/mobilenet_v2"))


@cache
def thousand():
    """25 layers of 100 channels."""
    convs = [nn.Conv2d(a, b, 1) for a, b in itertools.pairwise((3, *[100] * 25, 10))]
    return trace(nn.Sequential(*convs), (1, 3, 2, 2))


# --- sizes that are stated --------------------------------------------------------------------------------------------


def test_mobilenet_with_ten_choices_has_10_to_the_25():
    """BCNet, sections 3.1 and 4.4: 25 searchable layers, 10 groups each."""
    space = uniform_space(mobilenet(), 10)
    assert len(space.groups) == 25
    assert space.size == 10**25


def test_a_hundred_channels_in_25_layers():
    """CafeNet, section 1: 100 ** 25 possible networks."""
    assert uniform_space(thousand(), 100).size == 100**25


def test_twenty_choices_and_the_base_widths_of_bcnetv2():
    """BCNetV2, section 7.5: 3.4e32 with K = 20; a base width of 7 leaves (K - l_s) ** L = 7e27.

    The paper counts the widths above the base, so the narrowest one here is the eighth.
    """
    space = uniform_space(thousand(), 20)
    assert space.size == 20**25
    assert show_size(space.size) == "3.4e32"
    based = uniform_space(thousand(), 20, min_width="0.4x")
    assert based.groups[0].options == tuple(range(40, 101, 5))
    assert based.size == 13**25
    assert show_size(based.size) == "7.1e27"


def test_groups_with_fewer_channels_than_choices_have_fewer_choices():
    """MobileNetV2 has a layer of 16 channels, so that the nominal 20 ** 25 are really 16 * 20 ** 24."""
    assert uniform_space(mobilenet(), 20).size == 16 * 20**24


def test_bins_of_mobilenet_come_close_to_the_stated_size():
    """CafeNet, table 17: 1.5e27 with one stage. What is rounded how is not stated; the order of magnitude holds."""
    graph = mobilenet()
    by_equation_14 = float(np.prod(graph.group_widths / bin_sizes(graph, 1.0)))
    assert by_equation_14 < 1.5e27 < flops_bins(graph, 1.0).size
    assert abs(math.log10(flops_bins(graph, 1.0).size / 1.5e27)) < 0.2


def test_stages_shrink_the_space_as_table_17_does():
    """CafeNet, table 17: two stages of alpha 2 cut 1.5e27 to 2.0e19, three to 6.2e10, four to 7.3e3.

    These are first stages whose last stage has beta 1; ours differ by the rounding of bins of clipped layers.
    """
    graph = mobilenet()
    budget = parse_budget("0.5x", graph)
    sizes = []
    for stages in (1, 2, 3, 4):
        plan = StagePlan(budget, stages, 2.0, 2.0 ** (stages - 1))
        assert plan.beta_at(stages) == 1.0
        sizes.append(flops_bins(graph, plan.beta_at(1)).size)
    assert all(later < earlier / 1e5 for earlier, later in itertools.pairwise(sizes))
    assert abs(math.log10(sizes[1] / 2.0e19)) < 1.5


# --- options together -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [None, 1.0, 3.0])
@pytest.mark.parametrize("divisor", [1, 8, 16])
@pytest.mark.parametrize("high", ["1x", "1.5x"])
def test_base_width_divisor_and_fixed_groups_hold_together(bins, divisor, high):
    graph = mobilenet()
    fixed = {"features.0.0": 32, "features.18.0": 1000}
    space = make_space(graph, k=10, bins=bins, min_width="0.25x", max_width=high, divisor=divisor, fixed=fixed)
    for g in space.groups:
        if g.name in fixed:
            assert g.options == (fixed[g.name],)
            continue
        widest = round(g.width * float(high[:-1]))
        assert g.widest == widest
        assert g.narrowest >= min(round(0.25 * g.width), widest)
        assert all(o % divisor == 0 for o in g.options if o != widest)
    assert space.size == math.prod(len(g.options) for g in space.groups)


def test_the_narrowest_width_reads_the_same_as_a_number_and_as_text():
    assert uniform_space(small_graph(), 3, min_width="1") == uniform_space(small_graph(), 3, min_width=1)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_json_names_choices_bins_and_sensitivity():
    space = flops_bins(mobilenet(), 1.0)
    data = json.loads(json.dumps(space_json(space)))
    assert int(data["size"]) == space.size
    assert data["macs"]["widest"] == mobilenet().macs()
    for row, g, slope in zip(data["groups"], space.groups, mobilenet().sensitivity(), strict=True):
        assert row["choices"] == list(g.options)
        assert row["macs_per_unit"] == slope
        # The sensitivity is what one channel costs, exactly: costs are affine in one width.
        if g.name in ("features.18.0", "features.2.conv.0.0"):
            assert slope == mobilenet().macs() - mobilenet().macs({g.name: g.width - 1})


@pytest.mark.parametrize(
    ("size", "text"), [(1, "1"), (99_999, "99999"), (10**25, "1.0e25"), (999 * 10**20, "1.0e23"), (20**400, "2.6e520")]
)
def test_sizes_in_words(size, text):
    assert show_size(size) == text


def test_the_picture_is_a_png_and_depends_on_the_space():
    first = draw_space(flops_bins(small_graph(), 1.0), "a")
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert first == draw_space(flops_bins(small_graph(), 1.0), "a")
    assert first != draw_space(flops_bins(small_graph(), 4.0), "a")
    assert draw_space(SearchSpace(small_graph(), uniform_space(small_graph(), 1).groups), "one choice")


def test_the_command_prints_all_of_it_and_draws(tmp_path, capfd, monkeypatch):
    picture = tmp_path / "deep" / "bins.png"
    done = here(capfd, monkeypatch, "space", "torchvision/mobilenet_v2", "--k", 10, "--min-width", 1, "--out", picture)
    assert done.returncode == 0, done.stderr
    assert "25 groups, 1.0e25 width vectors" in done.stdout
    assert "features.18.0" in done.stdout
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_commands_options_reach_the_space(capfd, monkeypatch):
    args = ["--bins", 2, "--divisor", 8, "--max-width", "1.5x", "--min-width", "0.25x"]
    done = here(capfd, monkeypatch, "space", "torchvision/mobilenet_v2", *args, "--fix", "features.0.0=24", "--json")
    assert done.returncode == 0, done.stderr
    expected = make_space(
        mobilenet(), bins=2.0, divisor=8, max_width="1.5x", min_width="0.25x", fixed={"features.0.0": 24}
    )
    assert json.loads(done.stdout) == json.loads(json.dumps(space_json(expected, make_strategy(None, {}))))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--fix", "nope=3"], "unknown channel group 'nope'"),
        (["--fix", "features.0.0"], "GROUP=WIDTH"),
        (["--fix", "features.0.0=-3"], "GROUP=WIDTH"),
        (["--fix", "features.0.0=33"], "fixed width 33"),
        (["--bins", "0"], "--bins 0"),
        (["--out", "bins.jpg"], "PNG"),
    ],
)
def test_the_command_refuses_in_one_line(args, said, capfd, monkeypatch):
    done = here(capfd, monkeypatch, "space", "torchvision/mobilenet_v2", *args)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
