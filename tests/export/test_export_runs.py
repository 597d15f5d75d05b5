"""An exported network that cannot run is refused."""

import pytest
import torch
from topologies import PlainChain

from widthkit.errors import ExportError
from widthkit.export.dense import export
from widthkit.supernet import make_supernet
from widthkit.trace import trace

SHAPE = (2, 3, 8, 8)


class Fussy(PlainChain):
    """Refuses one width, in a way that no trace follows."""

    refused = "5"

    def forward(self, x):
        x = self.stem(x)
        if str(len(x[0])) == self.refused:
            raise ValueError("five is not a width")
        return self.head(self.mid(x))


@pytest.fixture
def fussy():
    """A model whose trace met no width that it refuses."""
    model = Fussy()
    model.refused = "0"
    graph = trace(model, SHAPE)
    model.refused = "5"
    assert graph.full == {"stem.conv": 6, "mid.conv": 8}
    return model, graph


def test_a_network_that_raises_is_refused_in_one_line(fussy):
    model, graph = fussy
    with pytest.raises(
        ExportError, match=r"does not run at these widths \(ValueError: five is not a width\)"
    ) as caught:
        export(model, {"stem.conv": 5}, graph=graph)
    assert "\n" not in str(caught.value)
    assert export(model, {"stem.conv": 4}, graph=graph)(torch.zeros(SHAPE)).shape == (2, 4, 8, 8)


def test_a_sub_network_of_a_supernet_that_raises_is_refused(fussy):
    model, graph = fussy
    net = make_supernet(model, "ua", graph=graph, k=6)
    with pytest.raises(ExportError, match="does not run at these widths"):
        export(net, {"stem.conv": 5, "mid.conv": 8})


def test_a_model_that_did_not_run_before_is_not_blamed_on_the_widths(fussy):
    model, graph = fussy
    model.refused = "6"
    with pytest.raises(ValueError, match="five"):
        model(torch.zeros(SHAPE))
    export(model, {"mid.conv": 4}, graph=graph)
