"""Arbitrary tasks: train, search and export with the user's own loss, on models that return what they like."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.segmentation import FCN, DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

import widthkit as wk
from widthkit.search import Judging
from widthkit.search.evaluator import Evaluator
from widthkit.train.modes import batch_size

ROOT = Path(__file__).parents[2]
BCCD = ROOT.parent / "shared" / "data" / "bccd" / "BCCD"
sys.path.insert(0, str(ROOT / "examples"))

import detection  # noqa: E402


def whole_job(model, example, train, valid, loss, strategy, call, **judging):
    """Train one epoch, search, export; the exported network must compute what the supernet does."""
    net = wk.make_supernet(model, strategy, example_inputs=example, k=3, min_width="0.5x")
    history = wk.train(net, train, 1, loss=loss, lr=0.01, clip_grad=1.0, device="cpu", progress=False).history
    assert math.isfinite(history[0]["loss"])
    result = wk.search(net, valid, "0.7x", "random", loss=loss, n=2, progress=False, **judging)
    assert result.macs <= 0.7 * result.full["macs"]
    assert math.isfinite(result.score)
    slim = wk.export(net, result)
    net.set_widths(result.units)
    with torch.no_grad():
        for mode in (True, False):
            outputs = []
            for module in (net, slim):
                torch.manual_seed(0)
                outputs.append(call(module.train(mode)))
            torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-6)
    return net, result


def segmenter(kind):
    backbone = IntermediateLayerGetter(ResNet(BasicBlock, [1, 1, 1, 1]), {"layer3": "aux", "layer4": "out"})
    if kind == "fcn":
        return FCN(backbone, FCNHead(512, 3), FCNHead(256, 3))
    return DeepLabV3(backbone, DeepLabHead(512, 3, (2, 4)))


def both_heads(outputs, targets):
    """torchvision's recipe: the auxiliary head counts half."""
    loss = F.cross_entropy(outputs["out"], targets)
    return loss + 0.5 * F.cross_entropy(outputs["aux"], targets) if "aux" in outputs else loss


@pytest.mark.parametrize(("kind", "strategy"), [("fcn", "ua"), ("deeplab", "bcv2")])
def test_segmentation_models_that_return_dictionaries(kind, strategy):
    torch.manual_seed(0)
    batches = [(torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32)))]
    net, _ = whole_job(
        segmenter(kind), (2, 3, 32, 32), batches, batches, both_heads, strategy, lambda m: m(batches[0][0])["out"]
    )
    assert "classifier.0" in net.graph.groups or "classifier.1" in net.graph.groups


@pytest.mark.parametrize("strategy", ["ua", "bc", "bcv2"])
def test_multi_label_with_every_strategy(strategy):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 40)
    )
    batches = [(torch.randn(8, 3, 12, 12), torch.randint(0, 2, (8, 40)).float()) for _ in range(2)]
    loss = F.binary_cross_entropy_with_logits
    _, result = whole_job(model, (2, 3, 12, 12), batches, batches, loss, strategy, lambda m: m(batches[0][0]))
    assert result.accuracy is None


@pytest.mark.parametrize("kind", ["retinanet", "fasterrcnn"])
def test_detectors_that_return_their_losses(kind):
    torch.manual_seed(0)
    train, valid = detection.batches(detection.discs(4, 1), 2), detection.batches(detection.discs(3, 2), 3)
    image = valid[0][0][0][0]

    def call(model):
        if model.training:
            return detection.loss(model(*valid[0][0]), None)
        return model([image])[0]["boxes"]

    net, _ = whole_job(
        detection.detector(kind), ([image],), train, valid, detection.loss, "bc", call, judging=Judging(training=True)
    )
    assert len(net.graph.groups["backbone.6"].sites) >= 2, "heads read the backbone's last layer"


def test_judging_in_training_mode_is_repeatable_and_leaves_nothing_behind():
    """Faster R-CNN draws proposals at random; the statistics of its batch norms would drift."""
    torch.manual_seed(0)
    valid = detection.batches(detection.discs(3, 2), 3)
    net = wk.make_supernet(detection.detector("fasterrcnn"), "ua", example_inputs=([valid[0][0][0][0]],), k=3).eval()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    state = torch.get_rng_state()
    judge = Evaluator(net, valid, detection.loss, Judging(training=True))
    first, second = judge(net.space.smallest), judge(net.space.smallest)
    assert first == second
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in net.model.modules())


@pytest.mark.data
@pytest.mark.skipif(not BCCD.is_dir(), reason=f"no blood cells in {BCCD}")
@pytest.mark.parametrize("kind", ["retinanet", "fasterrcnn"])
def test_detectors_on_blood_cells(kind, capsys):
    first, last = detection.main(str(BCCD), kind, n=4, epochs=2)
    assert last < first
    assert "0.0e+00" in capsys.readouterr().out


def test_a_batch_of_a_list_of_images_counts_its_images():
    images = [torch.zeros(3, 8, 8), torch.zeros(3, 9, 7)]
    assert batch_size((images, [{}, {}])) == 2
    assert batch_size({"images": images}) == 2
    assert batch_size([torch.zeros(5, 3), torch.zeros(5, 2)]) == 5
