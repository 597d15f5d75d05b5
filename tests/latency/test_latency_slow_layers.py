"""Marking networks that are slower than their MACs promise, and the layers behind it."""

import json
import time

import pytest
import torch
from torch import nn

import widthkit as wk
from widthkit.bench import latency
from widthkit.bench.latency import Setting
from widthkit.errors import OptionError, SlimFileError
from widthkit.latency.slow_layers import SlowLayer, is_slow, slow_layers, time_layers
from widthkit.report.run import remarks


class Sleepy(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x


def test_layers_count_what_fvcore_counts():
    from fvcore.nn import FlopCountAnalysis

    net = wk.create_model("torchvision/mobilenet_v2", num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    layers = time_layers(net, x, repeats=1, warmup=0)
    analysis = FlopCountAnalysis(net, x).unsupported_ops_warnings(False)
    by_module = analysis.by_module()
    named = dict(net.named_modules())
    counted = {n for n, layer in layers.items() if layer.macs}
    assert counted == {n for n, m in named.items() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert all(layers[n].macs == by_module[n] for n in counted)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_the_layer_that_did_not_get_faster_is_named():
    dense = nn.Sequential(nn.Conv2d(3, 8, 1), Sleepy(0.02), nn.Conv2d(8, 4, 1)).eval()
    slim = nn.Sequential(nn.Conv2d(3, 4, 1), Sleepy(0.02), nn.Conv2d(4, 4, 1)).eval()
    x = torch.randn(1, 3, 8, 8)
    (worst, *_) = slow_layers(time_layers(dense, x, repeats=3), time_layers(slim, x, repeats=3))
    assert (worst.name, worst.work) == ("1", 0.5)


def test_a_module_called_twice_counts_both_calls():
    shared = Sleepy(0.01)
    net = nn.Sequential(shared, shared)
    (layer,) = time_layers(net, torch.zeros(1), repeats=2, warmup=0).values()
    assert layer.ms > 19


def row(name, macs, ms, **more):
    return {"network": name, "macs": macs, "latency_ms": ms, "accuracy_mean": 0.9, "accuracy_std": None, **more}


def test_the_report_marks_the_network_and_names_the_layers():
    slow = SlowLayer("layer1.bn", 2.0, 1.9, 0.5, 0.9).record()
    table = [row("dense", 100, 10.0), row("uniform", 50, 6.0), row("searched", 50, 7.0, slow_layers=[slow])]
    (said,) = [r for r in remarks({"table": table}) if "MACs ratio" in r]
    assert "searched" in said
    assert "layer1.bn (2.00 -> 1.90 ms at 50% of its work)" in said
    assert not is_slow(10.0, 6.0, 100, 50)


def test_latency_of_dense_uniform_and_peer(tmp_path, capsys):
    out = tmp_path / "latency.json"
    latency.run(["timm/resnet10t"], "0.5x", [1], ["eager"], Setting(size=32, repeats=2), 8, out)
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
    more = {"slim": tmp_path / "slim", "widths": {"0": 8}, "peer": False}
    latency.run([name], "0.5x", [2], ["eager", "compiled"], setting, 1, out, **more)
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
        latency.run(["a", "b"], "0.5x", [1], ["eager"], Setting(), 1, None, slim=tmp_path / "slim")
    with pytest.raises((OptionError, SlimFileError), match="three_layers"):
        latency.networks("timm/resnet10t", "0.5x", 1, 32, slim=tmp_path / "slim", peer=False)


def test_uniform_widths_are_aligned_and_within_the_budget():
    nets, macs = latency.networks("timm/resnet10t", "0.5x", 8, 32, peer=False)
    assert macs["uniform"] <= 0.5 * macs["dense"]
    assert all(m.out_channels % 8 == 0 for m in nets["uniform"].modules() if isinstance(m, nn.Conv2d))


def test_modes_that_cannot_be_measured_are_refused():
    with pytest.raises(OptionError, match="did you mean eager"):
        latency.check(["eagre"], Setting())
    with pytest.raises(OptionError, match="CUDA graphs"):
        latency.check(["graphs"], Setting())
    with pytest.raises(OptionError, match="unknown dtype"):
        latency.check(["eager"], Setting(dtype="int4"))
