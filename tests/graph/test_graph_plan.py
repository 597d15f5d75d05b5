"""Plans: what is kept, where new entries go, what is refused."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from topologies import (
    Attention,
    FlattenLinear,
    GroupedByPosition,
    LearnedScale,
    PaddedShortcut,
    PlainChain,
    SplitStored,
    TiedWeight,
)
from torch import nn

from widthkit.errors import WidthsError
from widthkit.graph.plan import apply_plan, kept_units, make_plan, take
from widthkit.graph.resize import grow
from widthkit.trace import trace

SHAPE = (2, 3, 8, 8)


def test_a_width_keeps_the_first_units_and_names_only_what_changes():
    plan = make_plan(trace(PlainChain(), SHAPE), {"stem.conv": 2})
    assert plan.widths == {"stem.conv": 2, "mid.conv": 8}
    assert {(n, d) for n, dims in plan.tensors.items() for d in dims} == {
        ("stem.conv.weight", 0),
        ("stem.bn.weight", 0),
        ("stem.bn.bias", 0),
        ("stem.bn.running_mean", 0),
        ("stem.bn.running_var", 0),
        ("mid.conv.weight", 1),
    }
    assert plan.attributes == {
        ("stem.conv", "out_channels"): {None: 2},
        ("stem.bn", "num_features"): {None: 2},
        ("mid.conv", "in_channels"): {None: 2},
    }
    assert not plan.grows


def test_explicit_units_are_ordered():
    kept = kept_units(trace(PlainChain(), SHAPE), {"stem.conv": [4, 0, 2]})
    assert kept["stem.conv"].tolist() == [0, 2, 4]
    assert kept["mid.conv"].tolist() == list(range(8))


@pytest.mark.parametrize("units", [0, -1, [], [0, 0], [-1], [0.5], 2.5, "2", True, [[1]]])
def test_units_that_make_no_sense_are_refused(units):
    with pytest.raises(WidthsError, match=r"stem\.conv"):
        make_plan(trace(PlainChain(), SHAPE), {"stem.conv": units})


def test_unknown_groups_are_refused_everywhere():
    graph = trace(PlainChain(), SHAPE)
    for attempt in (make_plan, grow, lambda g, w: g.macs(w)):
        with pytest.raises(WidthsError, match="unknown channel group 'nothing'"):
            attempt(graph, {"nothing": 3})


def test_arrays_of_the_wrong_width_are_refused():
    with pytest.raises(WidthsError, match="2 groups"):
        trace(PlainChain(), SHAPE).macs(np.ones((4, 3), dtype=int))


def test_a_flattened_channel_owns_its_positions():
    plan = make_plan(trace(FlattenLinear(), SHAPE), {"stem.conv": [1, 3]})
    assert plan.tensors["fc.weight"][1].tolist() == [*range(16, 32), *range(48, 64)]


def test_a_position_is_kept_in_every_group():
    plan = make_plan(trace(GroupedByPosition(), SHAPE), {"stem.conv": [1, 2]})
    assert plan.tensors["stem.conv.weight"][0].tolist() == [1, 2, 5, 6]
    assert plan.tensors["g.conv.weight"][1].tolist() == [1, 2]


def test_positions_of_constants_stay():
    plan = make_plan(trace(PaddedShortcut(), SHAPE), {"stem.conv": [3]})
    assert plan.tensors["a.conv.weight"][0].tolist() == [0, 1, 5, 6, 7]


def test_python_attributes_follow():
    plan = make_plan(trace(Attention(), SHAPE), {"qkv": 3})
    assert plan.attributes["", "head_dim"] == {None: 3}
    assert ("", "heads") not in plan.attributes
    plan = make_plan(trace(SplitStored(), SHAPE), {"stem": 3, "stem:2": 1})
    slim = apply_plan(SplitStored(), plan)
    assert slim.sizes == [3, 1]


def test_shared_parameters_stay_shared():
    model = TiedWeight()
    slim = apply_plan(model, make_plan(trace(model, SHAPE), {"a": 5}))
    assert slim.a.weight is slim.b.weight
    assert slim.b.bias.shape == (5,)


def test_requires_grad_dtype_and_mode_are_kept():
    model = PlainChain().half().train()
    model.stem.conv.weight.requires_grad_(False)
    model.mid.eval()
    slim = apply_plan(model, make_plan(trace(model.float(), SHAPE), {"stem.conv": 2}))
    assert not slim.stem.conv.weight.requires_grad
    assert slim.mid.conv.weight.requires_grad
    assert slim.training
    assert not slim.mid.training


def test_values_are_the_kept_ones():
    model = PlainChain()
    slim = apply_plan(model, make_plan(trace(model, SHAPE), {"stem.conv": [1, 4], "mid.conv": [7]}))
    assert torch.equal(slim.mid.conv.weight, model.mid.conv.weight[[7]][:, [1, 4]])
    assert slim.mid.conv.weight.data_ptr() != model.mid.conv.weight.data_ptr()
    assert slim.mid.conv.weight.is_contiguous()


def test_taking_leaves_holes_for_new_entries():
    assert take(torch.arange(3.0), {0: np.array([2, -1, 0])}).tolist() == [2.0, 0.0, 0.0]


def test_growing_inserts_behind_every_run_of_the_last_unit():
    graph = trace(Attention(), SHAPE)
    plan, wide = grow(graph, {"qkv": 5})
    # Three parts, two heads, four entries each: every head of every part gets a fifth.
    expected = [p for head in range(6) for p in (*range(4 * head, 4 * head + 4), -1)]
    assert plan.tensors["qkv.weight"][0].tolist() == expected
    assert wide.groups["qkv"].sites[0].index.shape == (5, 6)
    assert make_plan(wide, {"qkv": 4}).tensors["qkv.weight"][0].tolist() == [
        i for i, e in enumerate(expected) if e >= 0
    ]


def test_growing_fills_new_entries_as_the_layer_would():
    model = PlainChain().eval()
    nn.init.constant_(model.mid.bn.running_var, 3.0)
    plan, _ = grow(trace(model, SHAPE), {"stem.conv": 6, "mid.conv": 12})
    wide, again = apply_plan(model, plan, seed=1), apply_plan(model, plan, seed=1)
    assert torch.equal(wide.mid.conv.weight, again.mid.conv.weight)
    assert not torch.equal(wide.mid.conv.weight, apply_plan(model, plan, seed=2).mid.conv.weight)
    assert torch.equal(wide.mid.conv.weight[:8], model.mid.conv.weight)
    bound = 1 / (9 * 6) ** 0.5
    new = wide.mid.conv.weight[8:].detach()
    assert 0 < float(new.abs().max()) <= bound
    assert wide.mid.bn.weight[8:].tolist() == [1.0] * 4
    assert wide.mid.bn.running_var.tolist() == [3.0] * 8 + [1.0] * 4


def test_new_entries_of_a_free_parameter_are_drawn_from_the_old_ones():
    model = LearnedScale()
    nn.init.constant_(model.scale, 1e-6)
    wide = apply_plan(model, grow(trace(model, SHAPE), {"stem": 9})[0])
    assert wide.scale.unique().tolist() == pytest.approx([1e-6])
    assert set(wide.shift.flatten().tolist()) == set(model.shift.flatten().tolist())


def test_a_norm_with_its_activation_inside_grows_as_a_norm():
    """timm's norms have children, and a variance must not come out negative."""

    class NormAct(nn.BatchNorm2d):
        def __init__(self, n):
            super().__init__(n)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(super().forward(x))

    model = nn.Sequential(nn.Conv2d(3, 4, 1), NormAct(4), nn.Conv2d(4, 2, 1))
    model[1].running_var.copy_(torch.tensor([0.1, 9.0, 0.1, 9.0]))
    wide = apply_plan(model, grow(trace(model, SHAPE), {"0": 30})[0])
    assert wide[1].running_var[4:].tolist() == [1.0] * 26


def test_growing_by_nothing_changes_nothing():
    graph = trace(PlainChain(), SHAPE)
    plan, same = grow(graph, graph.full)
    assert same is graph
    assert not plan.grows


def test_a_graph_can_be_copied_and_pickled_after_its_groups_were_read():
    graph = trace(PlainChain(), SHAPE)
    assert list(graph.groups) == ["stem.conv", "mid.conv"]
    for twin in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert list(twin.groups) == list(graph.groups)
        assert twin.macs({"mid.conv": 3}) == graph.macs({"mid.conv": 3})
