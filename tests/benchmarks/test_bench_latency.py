"""``widthkit bench latency``: which networks are built, and how they are measured."""

import json

import pytest
import torch
from torch import nn

import widthkit as wk
from widthkit.bench import latency
from widthkit.bench.latency import Setting
from widthkit.bench.networks import Comparison
from widthkit.errors import OptionError, SlimFileError


def test_latency_of_dense_uniform_and_peer(tmp_path, capsys):
    out = tmp_path / "latency.json"
    latency.run(["timm/resnet10t"], Comparison(), [1], ["eager"], Setting(size=32, repeats=2), out)
    rows = json.loads(out.read_text())["rows"]
    assert [r["network"] for r in rows] == ["dense", "uniform", "torch-pruning"]
    assert all(r["macs_ratio"] >= 2 for r in rows[1:])
    assert all(("slow_layers" in r) == r["slow"] for r in rows)
    assert "MACs ratio" in capsys.readouterr().out


def three_layers(classes=4, width=16):
    layers = nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 16, 3, padding=1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes))


class Own(nn.Module):
    """A forward of its own; torch treats that of its own containers apart."""

    def __init__(self, width):
        super().__init__()
        self.body = three_layers(width=width)

    def forward(self, x):
        return self.body(x)


@pytest.fixture
def compiled(monkeypatch):
    """Inputs of every graph that is compiled, by a backend that leaves the kernels as they are: a second, not ten."""
    found = []

    def backend(graph, inputs):
        found.append(inputs)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, **options: compile_(net, backend=backend, **options))
    return found


def test_latency_of_a_saved_and_of_a_searched_network_eager_and_compiled(tmp_path, compiled):
    name = f"{__name__}:three_layers"
    slim = wk.export(three_layers(classes=7), {"0": 3, "2": 5}, example_inputs=(1, 3, 16, 16))
    wk.save(slim, tmp_path / "slim", model=name, kwargs={"classes": 7})
    out = tmp_path / "latency.json"
    setting = Setting(size=16, repeats=1)
    comparison = Comparison(divisor=1, slim=tmp_path / "slim", widths={"0": 8}, peer=False)
    latency.run([name], comparison, [2], ["eager", "compiled"], setting, out)
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 4 * 2
    assert len(compiled) == 4
    assert {(r["network"], r["macs"]) for r in rows} == {
        ("dense", 16 * 16 * 9 * (3 * 16 + 16 * 16) + 16 * 7),
        ("searched", 16 * 16 * 9 * (3 * 8 + 8 * 16) + 16 * 7),
        ("slim", 16 * 16 * 9 * (3 * 3 + 3 * 5) + 5 * 7),
        ("uniform", next(r["macs"] for r in rows if r["network"] == "uniform")),
    }
    assert all(r["macs"] <= rows[0]["macs"] / 2 for r in rows if r["network"] == "uniform")


def test_every_network_is_compiled_at_every_batch_size(compiled):
    """Where the cache of their class is full, torch runs eagerly and only logs it; timm raises its size."""
    nets = {name: Own(width).eval() for name, width in (("dense", 8), ("b", 7), ("c", 6))}
    with torch._dynamo.config.patch(recompile_limit=8):
        for batch in range(2, 6):
            latency.measure(nets, dict.fromkeys(nets, 1), batch, "compiled", Setting(size=8, repeats=1))
    assert len(compiled) == 12


def test_kernels_are_compiled_for_the_cpu():
    nets = {"dense": Own(8).eval(), "slim": Own(4).eval()}
    rows = latency.measure(nets, {"dense": 2, "slim": 1}, 2, "compiled", Setting(size=8, repeats=3))
    assert [(r["network"], r["mode"]) for r in rows] == [("dense", "compiled"), ("slim", "compiled")]
    assert all(r["ms"] > 0 for r in rows)


def test_networks_of_another_model_are_refused(tmp_path):
    name = f"{__name__}:three_layers"
    wk.save(wk.export(three_layers(), {"0": 3}, example_inputs=(1, 3, 16, 16)), tmp_path / "slim", model=name)
    with pytest.raises(OptionError, match="one --model"):
        latency.run(["a", "b"], Comparison(slim=tmp_path / "slim"), [1], ["eager"], Setting(), None)
    with pytest.raises((OptionError, SlimFileError), match="three_layers"):
        Comparison(slim=tmp_path / "slim", peer=False).networks("timm/resnet10t", 32)


def test_uniform_widths_are_aligned_and_within_the_budget():
    nets, macs = Comparison(peer=False).networks("timm/resnet10t", 32)
    assert macs["uniform"] <= 0.5 * macs["dense"]
    assert all(m.out_channels % 8 == 0 for m in nets["uniform"].modules() if isinstance(m, nn.Conv2d))


def test_modes_that_cannot_be_measured_are_refused():
    with pytest.raises(OptionError, match="did you mean eager"):
        latency.check(["eagre"], Setting())
    with pytest.raises(OptionError, match="CUDA graphs"):
        latency.check(["graphs"], Setting())
    with pytest.raises(OptionError, match="unknown dtype"):
        latency.check(["eager"], Setting(dtype="int4"))
