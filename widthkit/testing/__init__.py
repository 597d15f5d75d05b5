"""Conformance suites: what every strategy, searcher and score model must hold to, for the built-in ones and for yours.

Subclass a suite in a test file, give it one fixture, and run pytest::

    from widthkit.testing import StrategyConformance

    class TestMine(StrategyConformance):
        @pytest.fixture
        def strategy(self):
            return MyStrategy(option=3)

Every test of the suite then runs on it. Needs pytest (``pip install 'widthkit[test]'``); nothing else of widthkit
imports this package.
"""

try:
    import pytest
except ImportError as error:  # pragma: no cover
    raise ImportError("widthkit.testing needs pytest: pip install 'widthkit[test]'") from error

pytest.register_assert_rewrite(
    "widthkit.testing.strategies",
    "widthkit.testing.strategy_units",
    "widthkit.testing.strategy_training",
    "widthkit.testing.searchers",
    "widthkit.testing.score_models",
)

from widthkit.testing.examples import SPACES, build_space, make_step, small_batch, small_graph, small_net  # noqa: E402
from widthkit.testing.score_models import ScoreModelConformance  # noqa: E402
from widthkit.testing.searchers import SearcherConformance  # noqa: E402
from widthkit.testing.strategies import StrategyConformance  # noqa: E402

__all__ = [
    "SPACES",
    "ScoreModelConformance",
    "SearcherConformance",
    "StrategyConformance",
    "build_space",
    "make_step",
    "small_batch",
    "small_graph",
    "small_net",
]
