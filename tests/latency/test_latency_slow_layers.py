"""Marking networks that are slower than their MACs promise, and the layers behind it."""

import time

import torch
from torch import nn

import widthkit as wk
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
