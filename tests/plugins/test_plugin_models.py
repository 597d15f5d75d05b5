"""Every registered strategy on every kind of network: trains, judges, exports."""

import pytest
import timm
import torch
import torch.nn.functional as F

import widthkit as wk
from widthkit.search.evaluator import Evaluator
from widthkit.supernet.strategy import STRATEGIES
from widthkit.testing import make_step

MODELS = {
    "resnet18": {},
    "mobilenetv2_100": {},
    "efficientnet_b0": {},
    "densenet121": {"block_config": (3, 3, 3, 3)},
    "convnext_atto": {},
}
STRATEGY_NAMES = ["bc", "bcv2", "dbc", "locally-free", "ua"]


def test_the_five_strategies_are_registered():
    assert set(STRATEGY_NAMES) <= set(STRATEGIES.names())


@pytest.fixture(scope="module", params=MODELS)
def traced(request):
    """A model and its graph; densenet121 has fewer layers per block, for time."""
    torch.manual_seed(0)
    model = timm.create_model(request.param, num_classes=4, **MODELS[request.param])
    return model.train(), wk.trace(model, (1, 3, 32, 32))


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
def test_a_strategy_trains_judges_and_exports(traced, strategy):
    model, graph = traced
    net = wk.make_supernet(model, strategy, graph=graph, k=4)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4)
    loss = net.train_step(make_step(0, batch=batch))
    assert loss.isfinite()
    # Where a block starts as the identity (its last norm scales by 0), the layers before it get no gradient yet.
    grads = [p.grad for p in net.model.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in grads)
    assert sum(bool(g.any()) for g in grads) > 0.4 * len(list(net.model.parameters()))
    widths = {g.name: g.options[len(g.options) // 2] for g in net.space.groups}
    found = Evaluator(net, [batch], F.cross_entropy)(widths)
    assert torch.isfinite(torch.tensor(found.score))
    chosen = net.chosen() or widths
    slim, sub = wk.export(net, chosen), net.set_widths(chosen)
    with torch.no_grad():
        torch.testing.assert_close(slim.eval()(batch[0]), sub.eval()(batch[0]), rtol=1e-4, atol=1e-4)
    assert type(slim) is type(model)
    costs = {name: len(units) if hasattr(units, "__len__") else units for name, units in chosen.items()}
    assert graph.params(costs) == sum(p.numel() for p in slim.parameters()) < graph.params()
