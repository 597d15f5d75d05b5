"""All oracles on random networks, and a broken oracle that must be noticed."""

from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from topologies import randomised

from benchmarks.fuzz.nets import LEAVES, NESTS, RandomNet
from benchmarks.fuzz.run import check, recipes
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
    torch.manual_seed(0)
    model = randomised(RandomNet([("conv", (4,)), recipe]))
    x = torch.randn(SHAPE, dtype=torch.float64)
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
    """The reader of one group takes its units in another order than the writer."""
    model = randomised(RandomNet([("conv", (4,))]))
    graph = trace(model, SHAPE)
    x = torch.randn(SHAPE, dtype=torch.float64)
    oracles.check_permutation(model, graph, x, np.random.default_rng(0), each=True)
    name, dim = next((s.tensor, s.dim) for group in graph.groups.values() for s in group.sites if s.dim == 1)
    info = graph.tensors[name]
    positions = info.dims[dim]
    rolled = replace(positions, group=np.roll(positions.group, 1), rank=np.roll(positions.rank, 1))
    dims = tuple(rolled if d == dim else own for d, own in enumerate(info.dims))
    wrong = replace(graph, tensors={**graph.tensors, name: replace(info, dims=dims)})
    with pytest.raises(AssertionError):
        oracles.check_permutation(model, wrong, x, np.random.default_rng(0), each=True)
