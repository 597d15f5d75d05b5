"""What the project promises on its first page, said as directly as possible."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import widthkit as wk
from widthkit.train import StepContext

ROOT = Path(__file__).parent.parent


def test_efficientnet_trains_a_step_and_exports_exactly():
    torch.manual_seed(0)
    net = wk.make_supernet(timm.create_model("efficientnet_b0"), strategy="bc").double().train()
    x, y = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.tensor([1, 2, 3, 4])
    before = [p.detach().clone() for p in net.parameters()]
    batches = [(x, y)]
    result = wk.train(net, batches, 1, lr=0.01, device="cpu", progress=False)
    assert np.isfinite(result.loss)
    assert sum(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)) > len(before) / 2
    rng = np.random.default_rng(0)
    for path in (0, 1):
        widths = net.space.sample(rng)
        slim = wk.export(net, widths, path=path)
        assert type(slim) is type(timm.create_model("efficientnet_b0"))
        for mode in (True, False):
            with torch.no_grad():
                a = net.set_widths(widths, path).train(mode)(x)
                b = slim.train(mode)(x)
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        assert net.graph.params(widths) == sum(p.numel() for p in slim.parameters())


def test_public_names_are_few_and_exist():
    assert len(wk.__all__) <= 18
    assert all(hasattr(wk, name) for name in wk.__all__)
    assert StepContext.__doc__


# What an example's main() returns shows that it learned: coin flips are right for half of the labels, one class
# for every pixel is right for a third of the classes, the best constant image is 0.29 off.
LEARNED = {
    "multi_label.py": lambda accuracy: accuracy > 0.56,
    "segmentation.py": lambda accuracy: accuracy > 0.42,
    "image_to_image.py": lambda error: error < 0.2,
    "detection.py": lambda losses: losses[1] < losses[0],
}


# The slim backbones' example needs data and has a test of its own.
EXAMPLES = [
    p for p in sorted((ROOT / "examples").glob("*.py")) if p.name not in ("detection_backbone.py", "train_digits.py")
]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_examples_run(path, capsys):
    figure = runpy.run_path(str(path))["main"]()
    assert "0.0e+00" in capsys.readouterr().out
    assert LEARNED.get(path.name, lambda _: True)(figure)


def counted_macs(model, x):
    """Multiply-adds of all convolutions and linear layers, counted from the shapes that pass through them."""
    counts = []

    def count(layer, inputs, output):
        if isinstance(layer, nn.Conv2d):
            counts.append(output.numel() * layer.weight[0].numel())
        else:
            counts.append(output.numel() * layer.in_features)

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    model(x)
    return sum(counts)


def test_ten_thousand_width_vectors_are_priced_exactly():
    with torch.device("meta"):
        model = wk.create_model("torchvision/resnet50")
    graph = wk.trace(model)
    rng = np.random.default_rng(0)
    vectors = rng.integers(1, graph.group_widths + 1, size=(10_000, len(graph.group_widths)))
    macs, params = graph.macs(vectors), graph.params(vectors)
    for i in (0, 1234, 5678, 9999):
        widths = dict(zip(graph.group_names, vectors[i].tolist(), strict=True))
        slim = wk.export(model, widths, graph=graph).eval()
        assert counted_macs(slim, torch.empty(1, 3, 224, 224, device="meta")) == macs[i]
        assert sum(p.numel() for p in slim.parameters()) == params[i]
