"""Models people use, at tiny inputs: every oracle, all groups at once."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import pytest
import timm
import torch
import torchvision
from topologies import randomised

from benchmarks import oracles
from widthkit.trace import trace

SIZES = {
    "torchvision/resnet18": 32,
    "torchvision/mobilenet_v2": 32,
    "torchvision/densenet121": 32,
    "torchvision/shufflenet_v2_x0_5": 32,
    "torchvision/googlenet": 48,
    "torchvision/alexnet": 64,
    "torchvision/mnasnet0_5": 32,
    "torchvision/mobilenet_v3_small": 32,
    "torchvision/squeezenet1_1": 48,
    "torchvision/regnet_y_400mf": 32,
    "torchvision/convnext_tiny": 32,
    "timm/resnet10t": 32,
    "timm/mobilenetv2_050": 32,
    "timm/efficientnet_b0": 32,
    "timm/regnetx_002": 32,
    "timm/convnext_atto": 32,
    "timm/resnext26ts": 32,
    "timm/ghostnet_050": 32,
    "timm/hrnet_w18_small": 64,
    "timm/res2net50_14w_8s": 32,
}
CUT = {  # nets of batch norms only, where zeroing what consumers read is dropping
    "torchvision/resnet18",
    "torchvision/mobilenet_v2",
    "torchvision/densenet121",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/googlenet",
    "torchvision/squeezenet1_1",
    "timm/efficientnet_b0",
    "timm/resnext26ts",
    "timm/ghostnet_050",
    "timm/res2net50_14w_8s",
}
FEWEST_GROUPS = {"torchvision/resnet18": 12, "torchvision/densenet121": 120, "timm/hrnet_w18_small": 40}
named = pytest.mark.parametrize("name", SIZES)


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    package, _, kind = name.partition("/")
    options = {"init_weights": False} if kind == "googlenet" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(kind) if package == "timm" else torchvision.models.get_model(kind, **options)
    return randomised(model)


@functools.cache
def traced(name: str):
    model = build(name)
    shape = (1, 3, SIZES[name], SIZES[name])
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return model, trace(model, shape), x


@named
def test_oracles(name):
    model, graph, x = traced(name)
    rng = np.random.default_rng(0)
    assert len(graph.groups) >= FEWEST_GROUPS.get(name, 2)
    assert graph.cost.searchable_share(graph.vector()) > 0.9
    oracles.check_permutation(model, graph, x, rng, each=False)
    oracles.check_cost(model, graph, x, oracles.random_units(graph, rng))
    net = oracles.supernet_of(model, graph)
    oracles.check_same_net(net, x, net.space.sample(rng))
    if name in CUT:
        oracles.check_cut(model, graph, x, oracles.random_units(graph, rng))


@pytest.mark.parametrize("name", ["torchvision/mobilenet_v2", "timm/resnext26ts"])
def test_growing_keeps_what_was_there(name):
    model, graph, x = traced(name)
    oracles.check_growth(model, graph, x, np.random.default_rng(0))


def test_auxiliary_heads_of_the_training_mode_are_traced():
    _, graph, _ = traced("torchvision/googlenet")
    assert any(g.startswith("aux1") for g in graph.groups)
    assert any("training" in note for note in graph.notes)
