"""Backbones: true channel counts and strides, and the frameworks that read them."""

import pytest
import timm
import torch
from timm.models import FeatureListNet
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.feature_extraction import create_feature_extractor

import widthkit as wk
from widthkit.errors import ModelError, OptionError, WidthkitError

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def slimmed(name, shape=(1, 3, 64, 64), seed=0, **kwargs):
    """Uneven widths, so that no count is right by accident."""
    torch.manual_seed(seed)
    model = wk.create_model(name, num_classes=5, **kwargs).eval()
    graph = wk.trace(model, shape)
    widths = {g: max(1, w * (3 + i % 4) // 8) for i, (g, w) in enumerate(graph.full.items())}
    return wk.export(model, widths, graph=graph).eval()


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("torchvision/resnet18", ["layer1", "layer2", "layer3", "layer4"]),
        ("torchvision/mobilenet_v2", ["features.3", "features.6", "features.13", "features.18"]),
        ("torchvision/convnext_tiny", ["features.1", "features.3", "features.5", "features.7"]),
    ],
)
def test_maps_are_those_of_torchvisions_own_extractor(name, nodes):
    slim = slimmed(name)
    body = wk.backbone(slim, example_inputs=(1, 3, 64, 64))
    with torch.no_grad():
        expected = list(create_feature_extractor(slim, nodes)(X).values())
        got = list(body(X).values())
    if name == "torchvision/convnext_tiny":  # the norm before a downsampling still has the finer resolution
        expected, got = expected[-1:], got[-1:]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert [m.shape[1] for m in body(X).values()] == body.channels
    assert body.strides == [4, 8, 16, 32]


@pytest.mark.parametrize("name", ["efficientnet_b0", "convnext_atto", "resnet10t", "regnetx_002", "densenet121"])
def test_timm_maps_and_feature_info_are_timms_own(name):
    slim = slimmed(f"timm/{name}")
    body = wk.backbone(slim, (0, 1, 2, 3), example_inputs=(1, 3, 64, 64), output="list")
    twin = wk.export(slim, {}, example_inputs=(1, 3, 64, 64))
    flat = name in ("efficientnet_b0", "convnext_atto", "densenet121")
    theirs = FeatureListNet(twin, (0, 1, 2, 3), flatten_sequential=flat).eval()
    with torch.no_grad():
        expected, got = theirs(X), body(X)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    channels = [m.shape[1] for m in expected]
    assert channels == body.channels == body.feature_info.channels()
    assert channels == theirs.feature_info.channels()  # the slim network's own feature_info is true
    assert body.feature_info.reduction() == theirs.feature_info.reduction() == body.strides


def test_features_only_networks_slim_their_maps_too():
    dense = timm.create_model("resnet10t", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    graph = wk.trace(dense, (1, 3, 64, 64), free_outputs=True)
    kept = wk.trace(dense, (1, 3, 64, 64))
    assert set(kept.full) < set(graph.full)
    slim = wk.export(dense, {g: max(1, w // 3) for g, w in graph.full.items()}, graph=graph)
    assert slim.feature_info.channels() == [m.shape[1] for m in slim(X)]
    assert dense.feature_info.channels() == [m.shape[1] for m in dense(X)]


def test_a_backbone_is_searched_with_free_or_fixed_maps():
    body = wk.backbone(wk.create_model("timm/resnet10t"), (1, 2, 3), example_inputs=(1, 3, 64, 64)).eval()
    for free in (False, True):
        net = wk.make_supernet(body, "ua", example_inputs=(1, 3, 64, 64), k=4, free_outputs=free).eval()
        widths = {g.name: g.width // 4 for g in net.space.groups}
        slim = wk.export(net, widths)
        assert (slim.channels == body.channels) == (not free)
        assert slim.channels == [m.shape[1] for m in slim(X).values()]
        with torch.no_grad():
            expected = net.set_widths(widths)(X)
        assert all(torch.equal(a, b) for a, b in zip(expected.values(), slim(X).values(), strict=True))
    assert body.channels == [64, 128, 256]


def test_feature_info_that_cannot_be_updated_is_announced():
    class OneSize(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 5 * 7, 2)
            self.feature_info = [{"num_chs": 8, "reduction": 1, "module": "stem"}]

        def forward(self, x):
            return self.head(self.stem(x).flatten(1))

    with pytest.warns(UserWarning, match=r"feature_info of OneSize still names the dense channel counts"):
        slim = wk.export(OneSize(), {"stem": 3}, example_inputs=(1, 3, 5, 7))
    assert slim.stem.out_channels == 3


def test_feature_info_survives_save_and_load(tmp_path):
    slim = slimmed("timm/resnet10t")
    wk.save(slim, tmp_path / "slim")
    again = wk.load(tmp_path / "slim")
    assert again.feature_info == slim.feature_info
    assert again.feature_info != timm.create_model("resnet10t").feature_info
    assert wk.backbone(again).channels == wk.backbone(slim).channels


def detector(kind, backbone):
    size = {"min_size": 64, "max_size": 64}
    levels = 1 if not isinstance(backbone, BackboneWithFPN) else 4
    anchors = AnchorGenerator(((32,), (40,), (48,), (64,))[:levels], ((1.0,),) * levels)
    if kind is RetinaNet:
        return RetinaNet(backbone, 3, anchor_generator=anchors, **size)
    return FasterRCNN(backbone, 3, rpn_anchor_generator=anchors, **size)


@pytest.mark.parametrize("kind", [RetinaNet, FasterRCNN])
@pytest.mark.parametrize("fpn", [True, False])
def test_detectors_take_slim_backbones_and_learn(kind, fpn):
    slim = slimmed("timm/resnet10t")
    if fpn:
        body = wk.backbone(slim, (2, 3, 4), example_inputs=(1, 3, 64, 64))
        body = BackboneWithFPN(body, body.return_layers, body.channels, 16)
    else:
        body = wk.backbone(slim, (3,), example_inputs=(1, 3, 64, 64))
    if kind is FasterRCNN and not fpn:
        assert body.out_channels == body.channels[0]
    torch.manual_seed(0)
    net = detector(kind, body).train()
    boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1])}] * 2
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-2)
    losses = []
    for _ in range(20):
        loss = sum(net(list(X), targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert all(p.grad is not None for n, p in net.named_parameters() if "layer" in n)
    assert sum(losses[-3:]) / 3 < 0.95 * losses[0]
    assert set(net.eval()([X[0]])[0]) == {"boxes", "labels", "scores"}


@pytest.mark.parametrize("name", ["torchvision/vit_b_32", "timm/hrnet_w18_small"])
def test_networks_without_a_chain_are_refused(name):
    with pytest.raises(ModelError, match="no chain of feature maps"):
        wk.backbone(wk.create_model(name))


def test_wrong_requests_are_refused():
    net = wk.create_model("timm/resnet10t")
    for indices in ((7,), (-9,), (1, 1), ()):
        with pytest.raises(ModelError, match="5 feature maps"):
            wk.backbone(net, indices)
    with pytest.raises(OptionError, match="output="):
        wk.backbone(net, output="tuple")
    with pytest.raises(WidthkitError, match="BackboneWithFPN"):
        _ = wk.backbone(net).out_channels
    with pytest.raises(ModelError, match="batch of images"):
        wk.backbone(nn.Linear(3, 3), example_inputs=(2, 3))


def test_the_head_and_its_pooling_stay_behind():
    body = wk.backbone(wk.create_model("torchvision/vgg11"), example_inputs=(1, 3, 64, 64))
    assert body.strides == [4, 8, 16, 32]
    assert not any(isinstance(m, (nn.AdaptiveAvgPool2d, nn.Linear)) for m in body.modules())
    big = torch.randn(1, 3, 96, 160)
    assert [tuple(m.shape[2:]) for m in body(big).values()] == [(24, 40), (12, 20), (6, 10), (3, 5)]


class InPlace(nn.Module):
    """Changes a feature map in place between two modules, which no tensor's identity shows."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)

    def forward(self, x):
        x = self.a(x)
        x.relu_()
        return self.b(x)


def test_an_operation_in_place_between_modules_ends_the_chain():
    body = wk.backbone(InPlace(), (0,), example_inputs=(1, 3, 16, 16))
    assert list(dict(body.named_children())) == ["a"]
