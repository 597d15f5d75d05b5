"""Export, train on, save, load, trace and slim again: every step keeps what the one before had, in float64."""

import json

import pytest
import torch
from torch import nn

import widthkit as wk

MODELS = {
    "timm/resnet10t": {},  # batch norm
    "timm/test_efficientnet": {},  # squeeze and excitation
    "timm/vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
}
SHAPE = (4, 3, 32, 32)


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=generator, dtype=torch.float64), torch.randint(5, (4,), generator=generator)


def dense(name):
    torch.manual_seed(0)
    return wk.create_model(name, num_classes=5, **MODELS[name]).double().eval()


def known(name):
    """Names and numbers of classes are found by widthkit itself, other arguments must be said (once)."""
    return {"model": name, "kwargs": {"num_classes": 5, **MODELS[name]}} if MODELS[name] else {}


def train(net, steps, seed=0):
    """A few steps with an ordinary optimiser; dropout and the like draw the same numbers every time."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    torch.manual_seed(seed)
    net.train()
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


def out(net):
    with torch.no_grad():
        return net(batch(100)[0])


def same(one, two):
    a, b = one.state_dict(), two.state_dict()
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", MODELS)
def test_export_train_save_load_trace_and_slim_again(name, tmp_path):
    model = dense(name)
    graph = wk.trace(model, SHAPE)
    once = wk.export(model, {g: max(1, w * 3 // 4) for g, w in graph.full.items()}, graph=graph).eval()
    untrained = out(once)
    train(once, 3)
    assert (out(once) - untrained).abs().max() > 1e-3
    formats = ["safetensors", "pt2"]
    wk.save(once, tmp_path / "once", formats=formats, example_inputs=SHAPE, say=None, **known(name))
    loaded = wk.load(tmp_path / "once").eval()
    assert same(loaded, once)
    assert torch.equal(out(loaded), out(once))
    record = json.loads((tmp_path / "once.pt2.json").read_text())
    assert all(c["largest_difference"] <= 1e-10 * c["largest_output"] for c in record["checks"])
    # What was loaded trains as what was saved does, bit for bit.
    assert same(train(loaded, 2, seed=1), train(once, 2, seed=1))
    again = wk.trace(loaded, SHAPE)
    assert set(again.full) == set(graph.full)
    assert again.macs() < graph.macs()
    # Widths a supernet of the slim network measures are those of the network that is slimmed again.
    widths = {g: max(1, w // 2) for g, w in again.full.items()}
    twice = wk.export(loaded, widths, graph=again).eval()
    net = wk.make_supernet(loaded, "ua", graph=again, k=4).eval()
    torch.testing.assert_close(out(twice), out(net.set_widths(widths)), rtol=0, atol=1e-10)
    train(twice, 3)
    wk.save(twice, tmp_path / "twice")
    last = wk.load(tmp_path / "twice").eval()
    assert same(last, twice)
    assert torch.equal(out(last), out(twice))
    assert type(last) is type(model)
    recipe = json.loads((tmp_path / "twice.json").read_text())
    assert recipe["model"]["name"] == name
    assert recipe["dense_macs"] == graph.macs()
    assert recipe["macs"] == wk.trace(last, SHAPE).macs()


@pytest.mark.parametrize("name", MODELS)
def test_slimming_twice_is_slimming_once(name, tmp_path):
    """Units that are kept of what was kept are the same as when they are named at once."""
    model = dense(name)
    graph = wk.trace(model, SHAPE)
    first = {g: max(1, w * 3 // 4) for g, w in graph.full.items()}  # the first units of each group
    wk.save(wk.export(model, first, graph=graph), tmp_path / "once", **known(name))
    loaded = wk.load(tmp_path / "once").eval()
    second = {g: list(range(0, w, 2)) for g, w in wk.trace(loaded, SHAPE).full.items()}
    twice = wk.export(loaded, second, example_inputs=SHAPE).eval()
    once = wk.export(model, second, graph=graph).eval()
    assert same(twice, once)
    assert torch.equal(out(twice), out(once))
