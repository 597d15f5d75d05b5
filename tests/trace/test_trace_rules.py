"""Labels of reshapes and data movement against the operator itself, run on a tensor of labels."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from widthkit.trace import trace
from widthkit.trace.components import connect, solve
from widthkit.trace.context import OpContext
from widthkit.trace.labels import Alternative, LabelStore
from widthkit.trace.recorder import Recorder
from widthkit.trace.recording import Recording
from widthkit.trace.rules import find
from widthkit.trace.rules.views import blocks

MODEL = nn.Identity()


def moved(function, shape, dim):
    """Labels of one dim after ``function``, by the rules: (labels per dim of the result, the store, the start)."""
    recording = Recording()
    x = torch.empty(shape, device="meta")
    labels = recording.store.new(shape[dim])
    recording.set_dims(x, tuple(labels if d == dim else None for d in range(len(shape))))
    with torch.inference_mode(), Recorder(recording, [("", MODEL)]):
        out = function(x)
    return recording, out, labels


def truth(function, shape, dim, labels):
    """The same, by the operator on a tensor that holds the labels."""
    column = [1] * len(shape)
    column[dim] = -1
    return function(torch.from_numpy(labels).reshape(column).expand(shape).clone()).numpy()


def assert_labels_are_true(function, shape, dim):
    recording, out, labels = moved(function, shape, dim)
    grid = truth(function, shape, dim, labels)
    solved = solve(recording.store)
    unit, frozen = solved.unit, solved.frozen
    found = recording.dims_of(out)
    varying = [e for e in range(grid.ndim) if (grid != grid.take([0], axis=e)).any()]
    if frozen[unit[labels]].all():
        return
    assert {e for e, own in enumerate(found) if own is not None} >= set(varying)
    if len(varying) == 1:
        (e,) = varying
        line = np.moveaxis(grid, e, 0).reshape(grid.shape[e], -1)
        assert (line == line[:, :1]).all()
        assert (unit[found[e]] == unit[line[:, 0]]).all()
        return
    free = [e for e in varying if not frozen[unit[found[e]]].any()]
    assert len(free) <= 1, "what remains must be a full rectangle"
    for e in free:
        own = found[e].reshape([-1 if d == e else 1 for d in range(grid.ndim)])
        assert (unit[np.broadcast_to(own, grid.shape)] == unit[grid]).all()


factors = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


@st.composite
def reshapes(draw):
    """Two shapes with the same product, and a dim of the first."""
    primes = draw(st.lists(st.sampled_from([1, 2, 2, 3]), min_size=2, max_size=6))

    def grouped():
        cuts = sorted(draw(st.sets(st.integers(1, len(primes) - 1), max_size=3)))
        ends = [0, *cuts, len(primes)]
        return tuple(math.prod(primes[a:b]) for a, b in itertools.pairwise(ends))

    before, after = grouped(), grouped()
    dims = [d for d, n in enumerate(before) if n > 1]
    return before, after, draw(st.sampled_from(dims)) if dims else None


@settings(max_examples=150, deadline=None)
@given(reshapes())
def test_a_reshape_moves_labels_as_it_moves_data(drawn):
    before, after, dim = drawn
    if dim is not None:
        assert_labels_are_true(lambda x: x.reshape(after), before, dim)


@settings(max_examples=100, deadline=None)
@given(reshapes())
def test_blocks_have_equal_products_and_cover_all(drawn):
    before, after, _ = drawn
    found = blocks(before, after)
    for a, b in found:
        assert math.prod(before[d] for d in a) == math.prod(after[d] for d in b)
    assert [d for a, _ in found for d in a] == [d for d, n in enumerate(before) if n > 1]
    assert [d for _, b in found for d in b] == [d for d, n in enumerate(after) if n > 1]


@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.permute(3, 0, 2, 1),
        lambda x: x.transpose(1, 3),
        lambda x: x.movedim(0, 2),
        lambda x: x.flatten(1, 2),
        lambda x: x.flip(1),
        lambda x: x.roll(2, 1),
        lambda x: x[:, 1:5:2],
        lambda x: x[..., None, :],
        lambda x: x[:, [3, 1, 2]],
        lambda x: x.narrow(1, 2, 3),
        lambda x: x.repeat(1, 2, 1, 1),
        lambda x: x.repeat_interleave(2, 1),
        lambda x: x.unsqueeze(0).expand(3, *x.shape),
        lambda x: torch.cat([x, x.flip(1)], 1),
        lambda x: x.unflatten(1, (2, 3)),
        lambda x: torch.pixel_shuffle(x.repeat(1, 2, 1, 1), 2),
        lambda x: torch.channel_shuffle(x, 3),
        lambda x: x.index_select(1, torch.tensor([5, 0])) if x.device.type != "meta" else x[:, [5, 0]],
    ],
)
def test_movement_is_exact(function, dim):
    assert_labels_are_true(function, (2, 6, 4, 5), dim)


def test_what_moves_whole_is_not_tied():
    for function in (lambda x: x.permute(3, 0, 2, 1), lambda x: x.flatten(1, 2), lambda x: x.roll(2, 1)):
        recording, _, labels = moved(function, (2, 6, 4, 5), 1)
        solved = solve(recording.store)
        assert len(np.unique(solved.unit[labels])) == 6
        assert not solved.frozen[solved.unit[labels]].any()


def test_equal_chunks_are_tied_and_explicit_sizes_are_not():
    for function, units in (
        (lambda x: x.chunk(2, 1)[0], 3),
        (lambda x: x.split(3, 1)[0], 3),
        (lambda x: x.split([3, 3], 1)[0], 6),
    ):
        recording, _, labels = moved(function, (2, 6), 1)
        assert len(np.unique(solve(recording.store).unit[labels])) == units


def test_an_unknown_operator_freezes_what_enters_it():
    recording, _, labels = moved(lambda x: torch.linalg.pinv(x), (4, 6), 1)
    solved = solve(recording.store)
    assert solved.frozen[solved.unit[labels]].all()


def test_rules_are_found_by_name_by_tag_and_in_place():
    assert find(torch.ops.aten.relu_.default) is find(torch.ops.aten.sin.default) is find(torch.ops.aten.add.Tensor)
    assert find(torch.ops.aten.linalg_qr.default) is None
    assert find(torch.ops.aten.conv2d.default) is find(torch.ops.aten.conv3d.default) is not None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_connect_is_reachability(pairs):
    unit = connect(10, [(np.array([a]), np.array([b])) for a, b in pairs])
    reach = np.eye(10, dtype=bool)
    for a, b in pairs:
        reach[a, b] = reach[b, a] = True
    for k in range(10):
        reach |= reach[:, [k]] & reach[[k]]
    assert (reach == (unit[:, None] == unit[None])).all()


def test_a_choice_takes_what_leaves_most_free():
    store = LabelStore()
    a, b = store.new(6), store.new(2)
    store.choose("m", "m splits", [Alternative("rows", ((a, np.repeat(b, 3)),)), Alternative("none", (), (b,))])
    solved = solve(store)
    assert solved.taken == [1]
    assert solve(store, {0: 0}).taken == [0]
    assert len(np.unique(solved.unit[a])) == 6


def test_constants_tie_no_strangers():
    store = LabelStore()
    a, b = store.new(2), store.new(2)
    store.tie(a, np.array([0, b[1]]))
    store.tie(b, np.array([0, b[1]]))
    solved = solve(store)
    assert solved.unit[a[0]] != solved.unit[b[0]]
    assert solved.frozen[solved.unit[[a[0], b[0]]]].all()


def test_arguments_are_bound_by_name():
    recording = Recording()
    x = torch.empty(2, 4)
    context = OpContext(recording, torch.ops.aten.sum.dim_IntList, (x, [1]), {}, x.sum(1), "", MODEL)
    assert context.arg("dim") == [1]
    assert context.arg("keepdim") is False


def test_positions_that_are_channels_are_priced_by_what_remains():
    # As in lambda layers: a convolution slides along one dim and visits channels, one by one, along the other.
    class Lambda(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.slide, self.head = nn.Linear(5, 8), nn.Conv2d(1, 2, (3, 1), padding=(1, 0)), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.slide(self.stem(x)[:, None]).sum(1))

    graph = trace(Lambda(), (1, 6, 5))
    name = next(n for n, w in graph.full.items() if w == 8)
    assert graph.macs() - graph.macs({name: 7}) == 6 * 5 + 2 * 3 * 6 + 6 * 4
