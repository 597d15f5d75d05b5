import pytest
from widthkit_plugins.strategies.sparse.strategy import SparseTraining
from widthkit_plugins.strategies.whole import WholeNetwork

from widthkit.testing import StrategyConformance


class TestWholeNetwork(StrategyConformance):
    @pytest.fixture
    def strategy(self):
        return WholeNetwork()


class TestS(StrategyConformance):
    @pytest.fixture(params=[{}, {"growth": 0.1, "target": "0.7x"}, {"reg": 0.0}], ids=str)
    def strategy(self, request):
        return SparseTraining(**request.param)
