"""All oracles on random networks."""

from __future__ import annotations

import numpy as np
import oracles
import torch
from blocks import RandomNet, recipes
from hypothesis import HealthCheck, given, settings
from topologies import randomised

from widthkit.trace import trace

SHAPE = (1, 3, 6, 6)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(recipes())
def test_oracles_on_random_networks(recipe):
    torch.manual_seed(0)
    model = randomised(RandomNet(recipe))
    x = torch.randn(SHAPE, dtype=torch.float64)
    graph = trace(model, SHAPE)
    rng = np.random.default_rng(0)
    oracles.check_permutation(model, graph, x, rng, each=True)
    oracles.check_cut(model, graph, x, rng)
    oracles.check_cost(model, graph, x, oracles.random_units(graph, rng))
    oracles.check_growth(model, graph, x, rng)
    if graph.groups:
        net = oracles.bc_net(model, graph).eval()
        oracles.check_same_net(net, x, net.space.sample(rng))
