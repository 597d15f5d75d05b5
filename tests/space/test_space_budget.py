"""Budgets: what people write, and what fits exactly."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from widthkit.budget import Budget, Limit, parse_budget, show_count
from widthkit.errors import BudgetError
from widthkit.space import uniform_space
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
        ("12MB", "is a memory budget, which is not supported yet"),
        ("1.5 GiB", "is a memory budget"),
        ("0.5x,12MB", "budget '12MB' is a memory budget"),
        ("1.8ms@cuda:0", "is a latency budget, which is not supported yet"),
        ("30 ms", "is a latency budget"),
        ("2GFLOPs", "is in FLOPs"),
        ("fast", "cannot be read"),
    ],
)
def test_other_budgets_are_refused_with_the_forms_that_exist(text, why):
    with pytest.raises(BudgetError, match=why) as caught:
        parse_budget(text, graph())
    assert "MACs (0.5x of the model's, 2.0GMACs) or params (3.1Mparams)" in str(caught.value)
    assert "\n" not in str(caught.value)


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
