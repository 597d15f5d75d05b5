"""Slices: the gradients, buffers and attributes of a sub-network, in every way of slicing."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from widthkit_plugins.strategies.bc import BilaterallyCoupled

from widthkit.errors import WidthsError
from widthkit.export.dense import export
from widthkit.supernet import make_supernet
from widthkit.supernet.slices import ParameterSlice, add_into, copy_into, gather, spec_of
from widthkit.testing import build_space, make_step, small_batch, small_graph, small_net
from widthkit.train import recalibrate

HUGE = 1 << 60

UNITS = {
    "left": {name: list(range(width // 2)) for name, width in small_graph().full.items()},
    "right": {name: list(range(width // 2, width)) for name, width in small_graph().full.items()},
    "scattered": {name: list(range(0, width, 2)) for name, width in small_graph().full.items()},
    "one group": {small_graph().group_names[1]: [1, 3, 4, 9]},
    "all": None,
}


def build(strategy=None, space="plain"):
    graph = small_graph()
    return make_supernet(small_net(), strategy or BilaterallyCoupled(), graph=graph, space=build_space(space, graph))


def gradients(net, units):
    images, labels = small_batch()
    net.zero_grad()
    F.cross_entropy(net.set_widths(units)(images), labels).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in net.model.named_parameters()}


def same(a, b, tolerance=1e-12):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=name)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", UNITS)
def test_every_way_to_slice_gives_the_same_gradients(units):
    found = []
    for threshold, direct in itertools.product((0, HUGE), (True, False)):
        net = build()
        net.slices.autograd_below, net.slices.in_place_gradients = threshold, direct
        found.append(gradients(net, UNITS[units]))
    for other in found[1:]:
        same(found[0], other)


@pytest.mark.parametrize("threshold", [0, HUGE])
@pytest.mark.parametrize("units", ["left", "scattered"])
def test_gradients_are_those_of_the_exported_network(units, threshold):
    net = build()
    net.slices.autograd_below = threshold
    whole = gradients(net, UNITS[units])
    slim = export(net, UNITS[units]).train()
    images, labels = small_batch()
    F.cross_entropy(slim(images), labels).backward()
    plan = net.plan(net.units(UNITS[units]))
    for name, parameter in slim.named_parameters():
        dims = plan.tensors.get(name, {})
        torch.testing.assert_close(gather(whole[name], spec_of(dims)), parameter.grad, rtol=0, atol=1e-12)
        # The rest got nothing.
        assert whole[name].abs().sum().item() == pytest.approx(parameter.grad.abs().sum().item(), abs=1e-10)


@pytest.mark.parametrize("threshold", [0, HUGE])
def test_gradients_add_up_over_backwards(threshold):
    net = build()
    net.slices.autograd_below = threshold
    images, labels = small_batch()
    single = [gradients(net, UNITS[units]) for units in ("left", "right", "scattered")]
    net.zero_grad()
    for units in ("left", "right", "scattered"):
        F.cross_entropy(net.set_widths(UNITS[units])(images), labels).backward()
    summed = {name: p.grad for name, p in net.model.named_parameters()}
    same(summed, {name: sum(grads[name] for grads in single) for name in summed})


@pytest.mark.parametrize("threshold", [0, HUGE])
def test_autograd_grad_works_without_gradients_in_place(threshold):
    net = build()
    net.slices.autograd_below, net.slices.in_place_gradients = threshold, False
    expected = gradients(net, UNITS["scattered"])
    images, labels = small_batch()
    loss = F.cross_entropy(net(images), labels)
    net.zero_grad()
    found = torch.autograd.grad(loss, list(net.model.parameters()))
    same(dict(zip(expected, found, strict=True)), expected)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("threshold", [0, HUGE])
def test_frozen_parameters_get_no_gradient(threshold):
    net = build()
    net.slices.autograd_below = threshold
    net.model.stem[0].weight.requires_grad_(False)
    images, labels = small_batch()
    F.cross_entropy(net.set_widths(UNITS["scattered"])(images), labels).backward()
    assert net.model.stem[0].weight.grad is None
    assert net.model.expand[0].weight.grad is not None


def test_a_train_step_is_the_same_with_and_without_gradients_in_place():
    found = []
    for in_place in (True, False):
        net = build()
        net.slices.autograd_below, net.slices.in_place_gradients = 0, in_place
        net.train_step(make_step(4))
        found.append({name: p.grad for name, p in net.named_parameters()})
    same(*found)


SPECS = {
    "rows": {0: [1, 2, 3]},
    "scattered rows": {0: [0, 2, 5]},
    "columns": {1: [2, 3]},
    "scattered columns": {1: [0, 3]},
    "rows and scattered columns": {0: [2, 3, 4], 1: [0, 2, 4]},
    "scattered both": {0: [0, 3, 5], 1: [1, 4]},
    "scattered three": {0: [0, 3, 5], 1: [1, 4], 2: [0, 2]},
}


@pytest.mark.parametrize("dims", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("direct", [True, False])
def test_a_slice_against_indexing(dims, direct):
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(6, 5, 4, generator=generator, dtype=torch.float64))
    spec = spec_of({dim: np.array(index) for dim, index in dims.items()})
    whole = [torch.tensor(dims.get(dim, range(size))) for dim, size in enumerate(parameter.shape)]
    where = torch.meshgrid(*whole, indexing="ij")
    part = ParameterSlice.apply(parameter, spec, direct)
    assert torch.equal(part, parameter[where])
    assert part.is_contiguous()
    seed = torch.randn(part.shape, generator=generator, dtype=torch.float64)
    (part * seed).sum().backward()
    expected = torch.zeros_like(parameter).index_put(where, seed)
    assert torch.equal(parameter.grad, expected)
    ParameterSlice.apply(parameter, spec, direct).sum().backward()
    torch.testing.assert_close(parameter.grad, expected + (expected != 0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dims", SPECS.values(), ids=SPECS)
def test_adding_and_copying_into_a_part(dims):
    target = torch.arange(120.0).reshape(6, 5, 4)
    spec = spec_of({dim: np.array(index) for dim, index in dims.items()})
    value = -gather(target, spec).clone() - 1
    added, copied = target.clone(), target.clone()
    add_into(added, spec, value)
    copy_into(copied, spec, value)
    assert (gather(added, spec) == -1).all()
    assert torch.equal(gather(copied, spec), value)
    assert int((added != target).sum()) == int((copied != target).sum()) == value.numel()


# --- buffers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", ["left", "right", "scattered"])
def test_running_statistics_of_a_subnetwork_go_back_to_its_units(units):
    net = build()
    chosen = net.units(UNITS[units])
    slim = export(net, UNITS[units]).train()
    before = {name: b.clone() for name, b in net.model.named_buffers()}
    images, _ = small_batch()
    net.run(chosen, images)
    slim(images)
    plan = net.plan(chosen)
    for name, buffer in net.model.named_buffers():
        index = plan.tensors.get(name, {}).get(0)
        if index is None:
            assert torch.equal(buffer, slim.get_buffer(name))
            continue
        assert torch.equal(buffer[torch.from_numpy(index)], slim.get_buffer(name)), name
        others = np.setdiff1d(np.arange(len(buffer)), index)
        assert torch.equal(buffer[others], before[name][others]), name


@pytest.mark.parametrize("units", ["left", "scattered"])
def test_recalibration_reaches_the_units_that_it_ran(units):
    """The model is in eval mode then and only its norms are not."""
    net = build().set_widths(UNITS[units])
    slim = export(net, UNITS[units])
    loader = [small_batch(1), small_batch(2)]
    recalibrate(net, loader)
    recalibrate(slim, loader)
    plan = net.plan()
    for name, buffer in slim.named_buffers():
        own = gather(net.model.get_buffer(name), spec_of(plan.tensors.get(name, {})))
        torch.testing.assert_close(own, buffer, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("units", ["left", "scattered"])
def test_running_in_eval_mode_changes_no_buffer(units):
    net = build().eval()
    before = {name: b.clone() for name, b in net.model.named_buffers()}
    net.run(net.units(UNITS[units]), small_batch()[0])
    assert all(torch.equal(b, before[name]) for name, b in net.model.named_buffers())


def test_truth_values_are_no_widths():
    with pytest.raises(WidthsError, match="True"):
        build().set_widths({small_graph().group_names[0]: True})


# --- what stays -------------------------------------------------------------------------------------------------------


def plain_state(net):
    tensors = {name: (id(t), t.shape) for name, t in [*net.model.named_parameters(), *net.model.named_buffers()]}
    settings = [(path, m.extra_repr(), m.training) for path, m in net.model.named_modules()]
    return tensors, settings


@pytest.mark.parametrize("threshold", [0, HUGE])
@pytest.mark.parametrize("units", ["left", "scattered"])
def test_an_exception_inside_forward_leaves_the_supernet_whole(units, threshold, monkeypatch):
    net = build()
    net.slices.autograd_below = threshold
    before, values = plain_state(net), copy.deepcopy(net.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(net.model.head, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            net.run(net.units(UNITS[units]), small_batch()[0])
    assert plain_state(net) == before
    parameters = {name for name, _ in net.named_parameters()}
    assert all(torch.equal(v, values[k]) for k, v in net.state_dict().items() if k in parameters)
    assert net(small_batch()[0]).shape == (8, 4)


def test_a_run_leaves_the_supernet_whole():
    net = build()
    before = plain_state(net)
    for units in UNITS.values():
        net.run(net.units(units), small_batch()[0])
    assert plain_state(net) == before


def test_a_deep_copy_is_independent():
    net = build().set_widths(UNITS["scattered"])
    images, labels = small_batch()
    expected = net.eval()(images).detach()
    twin = copy.deepcopy(net)
    assert torch.equal(twin(images), expected)
    twin.train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
    F.cross_entropy(twin(images), labels).backward()
    optimizer.step()
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(net(images), expected)
    assert not torch.equal(twin.eval()(images), expected)
    twin.set_widths(UNITS["left"])
    assert torch.equal(net(images), expected)
    assert net.training is False


def test_a_loaded_state_is_what_runs():
    """Also when loading replaces the parameters instead of filling them."""
    net, other = build().eval(), build().eval()
    net.run(net.units(UNITS["scattered"]), small_batch()[0])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    for assign in (False, True):
        net.load_state_dict(other.state_dict(), assign=assign)
        for units in UNITS.values():
            images = small_batch()[0]
            assert torch.equal(net.run(net.units(units), images), other.run(other.units(units), images))


def test_a_supernet_in_another_type_runs_in_it():
    net = build()
    net.run(net.units(UNITS["scattered"]), small_batch()[0])
    net.float()
    assert net.run(net.units(UNITS["scattered"]), small_batch()[0].float()).dtype == torch.float32
