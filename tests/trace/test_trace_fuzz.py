"""All oracles on random networks, and a broken oracle that must be noticed."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from benchmarks import oracles
from benchmarks.fuzz.check import check, check_network, random_model
from benchmarks.fuzz.nets import LEAVES, NESTS, RandomNet
from benchmarks.fuzz.run import recipes
from widthkit.graph.channel_graph import Positions
from widthkit.trace import trace

SHAPE = (1, 3, 6, 6)


@seed(0)
@settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(recipes(leaves=3, blocks=2), st.booleans(), st.integers(0, 99))
def test_oracles_on_random_networks(recipe, flat, widths):
    check(recipe, flat, widths)


@pytest.mark.parametrize("kind", [*LEAVES, *NESTS])
def test_every_block_alone(kind):
    recipe = (kind, (2,)) if kind in LEAVES else (kind, (("conv", (2,)), ("se", (1,))))
    check([("conv", (4,)), recipe], flat=True)
    model, x = random_model([("conv", (4,)), recipe], False, 0)
    graph = trace(model, x)
    assert graph.groups
    oracles.check_growth(model, graph, x, np.random.default_rng(0))


def test_se_inside_a_split_inside_a_residual():
    check([("residual", (("split", (("se", (2,)), ("grouped", (3,)))),)), ("shuffle", (("heads", (2,)),))])


def test_dilation_is_no_channel_count():
    # Two output channels beside a dilation and a padding of two.
    model = RandomNet([("concat", (("cat_self", (2,)), ("dilated", (1,))))])
    graph = trace(model, SHAPE)
    assert not {a.name for a in graph.attributes} & {"dilation", "padding", "kernel_size", "stride"}


def test_a_wrong_graph_is_noticed():
    model, x = random_model([("conv", (2,))], False, 0)
    graph = trace(model, x)
    right = graph.tensors["head.weight"]
    assert right.dims[1].searchable
    # The head reads the same units, but in another order than their producer writes them.
    wrong = replace(right, dims=(right.dims[0], Positions(right.dims[1].group, right.dims[1].rank[::-1].copy())))
    broken = replace(graph, tensors={**graph.tensors, "head.weight": wrong})
    with pytest.raises(oracles.OracleError, match=r"off by .*, with all groups permuted"):
        check_network(model, broken, x, np.random.default_rng(0))
