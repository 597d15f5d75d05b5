"""How evenly sub-networks use units: against closed forms, and against counting sub-networks."""

import numpy as np
import pytest
from widthkit_plugins.strategies.bc import BilaterallyCoupled
from widthkit_plugins.strategies.bcv2 import BilaterallyCoupledV2
from widthkit_plugins.strategies.locally_free import LocallyFree
from widthkit_plugins.strategies.ua import UniversallyAligned

from widthkit.graph.space import GroupChoices, make_space
from widthkit.modules.models import create_model
from widthkit.supernet.usage import unevenness, unit_uses
from widthkit.trace import trace

GROUP = GroupChoices("g", 6, (1, 2, 3, 4, 5, 6))


def test_cardinalities_of_the_papers():
    # BCNet, Eq. 6 and 9; BCNetV2, Eq. 21 with a base width of 2: l - l_s + 1 widths, each at both ends.
    assert unit_uses(UniversallyAligned(), GROUP).tolist() == [6, 5, 4, 3, 2, 1]
    assert unit_uses(BilaterallyCoupled(), GROUP).tolist() == [7] * 6
    assert unit_uses(BilaterallyCoupledV2(), GroupChoices("g", 6, (2, 3, 4, 5, 6))).tolist() == [5] * 8


def test_a_narrowest_width_makes_bc_uneven_and_not_bcv2():
    graph = trace(create_model("torchvision/mobilenet_v2"))
    space = make_space(graph, min_width="0.25x")
    assert max(unevenness(BilaterallyCoupled(), space).values()) > 1.2
    assert set(unevenness(BilaterallyCoupledV2(), space).values()) == {1.0}


@pytest.mark.parametrize(
    "limits", [{}, {"bins": 1.0}, {"max_width": "1.5x"}, {"bins": 4.0, "min_width": "0.25x"}], ids=str
)
def test_training_of_bcv2_is_even_on_any_grid(limits):
    """Judging is uneven where choices are unevenly spaced; every width and its complement train all units once."""
    graph = trace(create_model("torchvision/mobilenet_v2"))
    strategy, space = BilaterallyCoupledV2(), make_space(graph, **limits)
    assert 1.04 < max(unevenness(strategy, space).values()) < 1.6
    for g in space.groups:
        trained = np.zeros(strategy.capacity(g))
        for width in g.options:
            for vector in (width, strategy.complement(width, g)):
                for units in strategy.paths(vector, g):
                    trained[units] += 1
        assert set(trained) == {2 * len(g.options)}


def test_patterns_count_as_sub_networks():
    group = GroupChoices("g", 3, (1, 2, 3))
    expected = [0, 0, 0]
    for width in group.options:
        for pattern in LocallyFree().all_patterns(width, group):
            for unit in pattern:
                expected[unit] += 1
    assert unit_uses(LocallyFree(), group).tolist() == expected
