"""Budgets: what people write, and what fits exactly."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from widthkit.budget import Budget, Limit, parse_budget, show_count
from widthkit.errors import BudgetError
from widthkit.graph.space import uniform_space
from widthkit.latency import Conditions
from widthkit.trace import trace


@cache
def graph():
    """8 + 4 channels on 8 x 8 images: 3 * 9 * 36 * w MACs in the first layer, 9 * 4 * 16 * w in the second."""
    return trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), (1, 3, 8, 8))


FULL = 8 * (3 * 9 * 36 + 9 * 4 * 16)  # 12384


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("0.5x", [("macs", FULL // 2)]),
        (".5x", [("macs", FULL // 2)]),
        (" 0.5 X ", [("macs", FULL // 2)]),
        ("1x", [("macs", FULL)]),
        ("1.0x", [("macs", FULL)]),
        ("5e-1x", [("macs", FULL // 2)]),
        ("2.0GMACs", [("macs", 2 * 10**9)]),
        ("2.0gmacs", [("macs", 2 * 10**9)]),
        ("3.1Mparams", [("params", 3_100_000)]),
        ("2.3Mparams", [("params", 2_300_000)]),
        ("1.001 kMACs", [("macs", 1001)]),
        ("300M MACs", [("macs", 3 * 10**8)]),
        ("300m macs", [("macs", 3 * 10**8)]),
        ("1.5TMACs", [("macs", 1_500_000_000_000)]),
        ("1200MACs", [("macs", 1200)]),
        ("1e3 params", [("params", 1000)]),
        ("0.0015kparams", [("params", 1)]),
        ("1e30MACs", [("macs", 2**53)]),
        ("1e999x", [("macs", 2**53)]),
        ("0.5x,300params", [("macs", FULL // 2), ("params", 300)]),
        ("0.5x, 300 params", [("macs", FULL // 2), ("params", 300)]),
        (["0.5x", "300params"], [("macs", FULL // 2), ("params", 300)]),
        (("0.5x",), [("macs", FULL // 2)]),
    ],
)
def test_budgets_that_can_be_read(text, limits):
    budget = parse_budget(text, graph())
    assert [(limit.kind, limit.value) for limit in budget.limits] == limits
    assert parse_budget(str(budget).replace(" and ", ","), graph()) == budget


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "x",
        "half",
        "0.5",
        "5M",
        "-0.5x",
        "0x",
        "0MACs",
        "nanx",
        "infx",
        "1e-9x",
        "1e-999x",
        "0.5kx",
        "2 GMAC s",
        "0.5x,",
        ",",
        "1,000MACs",
        "2..0GMACs",
        "0.5.x",
        "2.0GMACs/s",
        "１x",
        "0.9params",
        0.5,
        None,
        [],
        [None],
        [0.5],
    ],
)
def test_budgets_that_cannot(text):
    with pytest.raises(BudgetError, match="budget"):
        parse_budget(text, graph())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("12Mb", "a small b leaves open: write MB"),
        ("12 bytes", "write B, kB, MB or MiB"),
        ("30fps", "write us, ms or s of one pass"),
        ("5min", "write us, ms or s of one pass"),
        ("2GFLOPs", "is in FLOPs"),
        ("fast", "cannot be read"),
    ],
)
def test_other_budgets_are_refused_with_the_forms_that_exist(text, why):
    with pytest.raises(BudgetError, match=why) as caught:
        parse_budget(text, graph())
    assert "MACs (0.5x of the model's, 2.0GMACs) or params (3.1Mparams), memory (12MB" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value", "at"),
    [
        ("12MB", 12 * 10**6, Conditions()),
        ("12mb", 12 * 10**6, Conditions()),
        ("1.5 MiB", 3 * 2**19, Conditions()),
        ("2kB", 2000, Conditions()),
        ("900B", 900, Conditions()),
        ("8MB@batch=16", 8 * 10**6, Conditions(batch=16)),
        ("8MB@bf16,batch=16", 8 * 10**6, Conditions(batch=16, dtype="bfloat16")),
    ],
)
def test_memory_budgets(text, value, at):
    (limit,) = parse_budget(text, graph()).limits
    assert (limit.kind, limit.value, limit.conditions) == ("memory", value, at)


@pytest.mark.parametrize(
    ("text", "ms", "at"),
    [
        ("1.8ms", 1.8, Conditions()),
        ("1800us", 1.8, Conditions()),
        ("0.0018 s@cpu", 1.8, Conditions("cpu")),
        ("1.8ms@cpu,batch=8,channels_last,bf16", 1.8, Conditions("cpu", 8, "bfloat16", True)),
    ],
)
def test_latency_budgets(text, ms, at):
    """Reading one measures nothing."""
    (limit,) = parse_budget(text, graph()).limits
    assert (limit.kind, limit.conditions) == ("latency", at)
    assert limit.value == pytest.approx(ms)
    assert limit.latency is not None


def test_words_behind_an_at_belong_to_the_budget_before_them():
    budget = parse_budget("0.5x,12MB@batch=16,bf16,1.8ms@cpu,batch=8,300params", graph())
    assert [limit.text for limit in budget.limits] == ["0.5x", "12MB@batch=16,bf16", "1.8ms@cpu,batch=8", "300params"]
    assert parse_budget([limit.text for limit in budget.limits], graph()) == budget


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0.5x@cpu", "MACs and parameters are per example on any device"),
        ("12MB@cpu", r"memory depends on batch= and the type alone"),
        ("12MB@channels_last", r"memory depends on batch= and the type alone"),
        ("12MB@", "neither a device"),
        ("0.4B", "allows nothing at all"),
        ("0ms", "positive, finite time"),
        ("1e999ms", "positive, finite time"),
        ("1ms@cpu,fast", "'fast' is neither a device"),
        ("1ms@batch=0", "no batch size"),
        ("1ms@cpu,batch=2,batch=4", "names its batch size twice"),
        ("0.5x,bf16", "'bf16' cannot be read"),
    ],
)
def test_conditions_that_make_no_sense_are_refused(text, why):
    with pytest.raises(BudgetError, match=why) as caught:
        parse_budget(text, graph())
    assert "\n" not in str(caught.value)


def test_costs_are_written_with_their_units():
    assert Limit("memory", 1, "").show(12_345_678) == "12.3 MB"
    assert Limit("latency", 1, "").show(1.23456) == "1.23 ms"
    assert Limit("params", 1, "").show(1234) == "1.23k params"


def test_the_bound_itself_fits():
    for width in range(1, 9):
        widths = {"0": width}
        macs, params = graph().macs(widths), graph().params(widths)
        for text in (f"{macs}MACs", f"{params}params", f"{macs}MACs,{params}params"):
            budget = parse_budget(text, graph())
            assert budget.fits(graph(), widths)
            assert budget.usage(graph(), widths) == 1.0
        for text in (f"{macs - 1}MACs", f"{params - 1}params", f"{macs}MACs,{params - 1}params"):
            budget = parse_budget(text, graph())
            assert not budget.fits(graph(), widths)
            assert budget.usage(graph(), widths) > 1.0


@given(eighths=st.integers(1, 8))
def test_ratios_are_exact(eighths):
    """Every eighth of this model's MACs is a whole number, so nothing may be lost to rounding."""
    budget = parse_budget(f"{eighths / 8}x", graph())
    assert budget.limits[0].value == graph().macs({"0": eighths})
    assert budget.fits(graph(), {"0": eighths})
    assert eighths == 8 or not budget.fits(graph(), {"0": eighths + 1})


@given(number=st.decimals(min_value="0.01", max_value="9999", places=2))
@settings(max_examples=300)
def test_decimals_mean_what_they_say(number):
    # int(2.3 * 10**6) is 2299999 in floats.
    assert parse_budget(f"{number}Mparams", graph()).limits[0].value == number.scaleb(6)


def test_usage_is_that_of_the_tightest_bound_and_vectorised():
    budget = parse_budget("0.5x,100params", graph())
    many = np.array([[1], [2], [4], [8]])
    costs = budget.costs(graph(), many)
    assert costs.shape == (4, 2)
    assert budget.usage(graph(), many).tolist() == costs.max(axis=1).tolist()
    assert [budget.usage(graph(), {"0": int(w)}) for w in many[:, 0]] == budget.usage(graph(), many).tolist()
    assert [bool(u <= 1) for u in budget.usage(graph(), many)] == [
        budget.fits(graph(), {"0": int(w)}) for w in many[:, 0]
    ]


def test_a_budget_below_the_narrowest_network_is_refused():
    space = uniform_space(graph(), 4)
    narrowest = graph().macs({"0": 2})
    parse_budget(f"{narrowest}MACs", graph()).check(space)
    with pytest.raises(BudgetError, match=r"below the narrowest network of this space \(3\.10k MACs, 132 params\)"):
        parse_budget(f"{narrowest - 1}MACs", graph()).check(space)
    with pytest.raises(BudgetError, match="raise the budget or lower min_width"):
        parse_budget("1x,10params", graph()).check(space)


def test_a_budget_passes_through():
    budget = Budget((Limit("macs", 5, "5MACs"),))
    assert parse_budget(budget, graph()) is budget


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (12345, "12.3k"),
        (300_774_272, "301M"),
        (4.1e9, "4.10G"),
        (2e12, "2.00T"),
    ],
)
def test_counts_for_people(value, text):
    assert show_count(value) == text
