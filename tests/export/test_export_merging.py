"""Networks of several branches: widths from the merged network, training on the branches, merged exports."""

import json

import numpy as np
import pytest
import timm
import torch
from torch import nn

import widthkit as wk
from widthkit.errors import ModelError, OptionError
from widthkit.modules.blocks import ResidualConv, residual_separable
from widthkit.modules.clone import named_tensors
from widthkit.modules.merging import merge, merging_module
from widthkit.testing import make_step

SIZE = 64


def own_net():
    """A plain 3x3 block, a strided one, and depthwise + 1x1 blocks: PaS's building blocks."""
    return nn.Sequential(
        ResidualConv(3, 12, stride=2),
        ResidualConv(12, 12),
        ResidualConv(12, 12),
        residual_separable(12, 12),
        residual_separable(12, 16, stride=2),
        ResidualConv(16, 16, 1, act=None),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


NETS = {
    "own": own_net,
    "repvgg_a0": lambda: timm.create_model("repvgg_a0", num_classes=5),
    "mobileone_s0": lambda: timm.create_model("mobileone_s0", num_classes=5),
}


def build(name):
    """A network whose running statistics and affine parameters tell branches and channels apart.

    No channel's variance is next to nothing: dividing by such a one would blow up float32's rounding in either network.
    """
    torch.manual_seed(0)
    model = NETS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 0.4)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    wk.recalibrate(model, [(torch.randn(16, 3, SIZE, SIZE), None)])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.clamp_(min=0.1)
    return model.eval()


@pytest.fixture(scope="module", params=NETS)
def case(request):
    model = build(request.param)
    net = wk.make_supernet(model, "dbc", merges=True, example_inputs=(1, 3, SIZE, SIZE))
    return request.param, model, net


def random_units(net, seed):
    rng = np.random.default_rng(seed)
    full = net.graph.full.items()
    return {n: np.sort(rng.choice(w, size=int(rng.integers(1, w + 1)), replace=False)) for n, w in full}


def test_every_layer_has_a_width_of_its_own(case):
    name, model, net = case
    if name == "mobileone_s0":
        # A depthwise block keeps the width of the 1x1 block before it; every other block is free.
        blocks = [block for stage in model.stages for block in stage]
        assert len(net.graph.group_names) == 1 + sum(block.conv_kxk[0].conv.groups == 1 for block in blocks)
        return
    if name == "repvgg_a0":
        # One group per block; the residual network has one per stage.
        assert len(net.graph.group_names) == 1 + sum(len(stage) for stage in model.stages)
    assert len(net.graph.group_names) > 2 * len(wk.trace(model, (1, 3, SIZE, SIZE)).group_names)


def test_the_exported_network_is_the_training_network_without_those_units(case):
    _, model, net = case
    x = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    ends = np.cumsum(list(net.graph.full.values()))
    starts = {name: int(end) - w for (name, w), end in zip(net.graph.full.items(), ends, strict=True)}
    for seed in range(2):
        units = random_units(net, seed)
        bits = torch.zeros_like(net.policy.gates)
        for name, kept in units.items():
            bits[starts[name] + torch.from_numpy(kept)] = 1
        with torch.no_grad():
            slim = wk.export(net, units)
            expected, gated = net.run(units, x), net.forward_gated(bits, make_step(batch=(x, None)))
            torch.testing.assert_close(slim(x), expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(gated, expected, rtol=0, atol=1e-5)
            assert (expected - model(x)).abs().max() > 1e-3
        # Plain layers only, and as many MACs as foretold.
        assert not any(isinstance(m, nn.BatchNorm2d) for m in slim.modules())
        widths = {name: len(kept) for name, kept in units.items()}
        assert net.graph.params(widths) == sum(p.numel() for p in slim.parameters())


def test_merging_leaves_the_model_alone_and_computes_the_same(case):
    _, model, _ = case
    before = {name: t.clone() for name, t in named_tensors(model).items()}
    x = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(merge(model)(x), model(x), rtol=0, atol=1e-5)
    assert all(torch.equal(t, before[name]) for name, t in named_tensors(model).items())


@pytest.mark.parametrize("strategy", ["dbc", "ua", "locally-free"])
def test_branches_learn_and_the_result_is_merged(strategy):
    torch.manual_seed(0)
    model = own_net()
    net = wk.make_supernet(model, strategy, merges=True, example_inputs=(1, 3, 16, 16), k=3)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 16, 16, generator=generator)
    labels = (images[:, 0].mean((1, 2)) > 0).long()
    batches = list(zip(images.split(16), labels.split(16), strict=True)) * 4
    result = wk.train(net, batches, 3, lr=0.1, device="cpu", progress=False, clip_grad=5.0)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    found = wk.search(net, batches, "0.5x", searcher="uniform", progress=False)
    wk.recalibrate(net.set_widths(found.widths), batches)
    net.eval()
    slim = wk.export(net)
    with torch.no_grad():
        torch.testing.assert_close(slim(images), net(images), rtol=0, atol=1e-5)
    assert net.graph.macs(found.widths) <= 0.5 * net.graph.macs()
    if strategy == "dbc":
        assert net.graph.macs(found.widths) >= 0.49 * net.graph.macs()


def test_a_merged_network_is_saved_and_loaded(tmp_path):
    model = build("repvgg_a0")
    net = wk.make_supernet(model, "dbc", merges=True, example_inputs=(1, 3, SIZE, SIZE))
    slim = wk.export(net, {name: max(1, w // 3) for name, w in net.graph.full.items()})
    wk.save(slim, tmp_path / "slim")
    x = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(wk.load(tmp_path / "slim")(x), slim.eval()(x))
    recipe = json.loads((tmp_path / "slim.json").read_text())
    assert recipe["model"]["kwargs"]["merged"] is True


class Twice(nn.Module):
    """A block that merges to two layers: between them no gate fits."""

    def __init__(self):
        super().__init__()
        self.first, self.second = ResidualConv(6, 6), ResidualConv(6, 6)

    def forward(self, x):
        return self.second(self.first(x))

    def fuse(self):
        return nn.Sequential(self.first.fuse(), self.second.fuse())


def test_what_cannot_be_gated_or_merged_is_refused():
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with pytest.raises(ModelError, match="no block with fuse"):
        wk.make_supernet(plain, "dbc", merges=True, example_inputs=(1, 3, 8, 8))
    with pytest.raises(OptionError, match="cannot grow"):
        wk.make_supernet(own_net(), "bcv2", merges=True, example_inputs=(1, 3, 16, 16), min_width="0.25x")
    two = nn.Sequential(ResidualConv(3, 6), Twice(), nn.Conv2d(6, 2, 1))
    with pytest.raises(ModelError, match=r"1 merges to several layers"):
        wk.make_supernet(two, "dbc", merges=True, example_inputs=(1, 3, 8, 8))


class Deploys(nn.Module):
    """A stranger's block that changes itself in place."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.bn, self.plain = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), None

    def forward(self, x):
        if self.plain is not None:
            return self.plain(x).relu()
        return (self.bn(self.conv(x)) + x).relu()

    def switch_to_deploy(self):
        scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
        self.plain = nn.Conv2d(*self.conv.weight.shape[:2], 3, padding=1)
        kernel = self.conv.weight * scale.reshape(-1, 1, 1, 1)
        kernel[range(len(kernel)), range(len(kernel)), 1, 1] += 1
        self.plain.weight.copy_(kernel)
        self.plain.bias.copy_(self.bn.bias + (self.conv.bias - self.bn.running_mean) * scale)
        del self.conv, self.bn


def test_a_strangers_block_works():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), Deploys(6), Deploys(6), nn.Conv2d(6, 2, 1))
    wk.recalibrate(model, [(torch.randn(8, 3, 8, 8), None)])
    net = wk.make_supernet(model.eval(), "ua", merges=True, example_inputs=(1, 3, 8, 8))
    assert len(net.graph.group_names) == 3
    x = torch.randn(2, 3, 8, 8)
    units = random_units(net, 0)
    with torch.no_grad():
        torch.testing.assert_close(wk.export(net, units)(x), net.run(units, x), rtol=0, atol=1e-5)
    assert merging_module(model, "1.plain") == "1"
