"""The strategy against widthkit's conformance suite, and what is its own."""

import pytest
from widthkit_windows import Windows

from widthkit.graph.space import GroupChoices
from widthkit.testing import StrategyConformance


class TestWindows(StrategyConformance):
    @pytest.fixture
    def strategy(self):
        return Windows(n_windows=3)


def test_windows_lie_evenly_between_both_ends():
    choices = GroupChoices("g", 8, (2, 4, 8))
    assert [list(units) for units in Windows(3).paths(4, choices)] == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]
