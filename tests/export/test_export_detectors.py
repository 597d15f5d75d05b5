"""Whole detectors and segmenters, heads included: traced, slimmed, exported, their class outputs kept unasked."""

import pytest
import torch
from torch import nn
from torchvision.models import segmentation
from torchvision.models.detection import FCOS, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

import widthkit as wk

IMAGES = ([torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))],)
SIZE = {"min_size": 64, "max_size": 64}


def body():
    pairs = ((3, 8), (8, 16), (16, 16), (16, 32))
    net = nn.Sequential(*[m for i, o in pairs for m in (nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())])
    net.out_channels = 32
    return net


def anchors(*sizes):
    return AnchorGenerator((sizes,), ((1.0,),))


def retinanet():
    few = {"score_thresh": 0.0, "detections_per_img": 5, "topk_candidates": 50}
    return RetinaNet(body(), 3, anchor_generator=anchors(16, 32), **few, **SIZE)


def fcos():
    few = {"score_thresh": 0.0, "detections_per_img": 5, "topk_candidates": 50}
    return FCOS(body(), 3, anchor_generator=anchors(16), **few, **SIZE)


def mask_rcnn():
    few = {"rpn_post_nms_top_n_test": 20, "rpn_pre_nms_top_n_test": 50, "box_detections_per_img": 8}
    return MaskRCNN(body(), 3, rpn_anchor_generator=anchors(16, 32), box_score_thresh=0.0, **few, **SIZE)


CASES = {
    "retinanet": (retinanet, {"head.classification_head.cls_logits", "head.regression_head.bbox_reg"}),
    "fcos": (fcos, {"head.classification_head.cls_logits", "head.regression_head.bbox_reg"}),
    "mask_rcnn": (
        mask_rcnn,
        {"rpn.head.cls_logits", "roi_heads.box_predictor.cls_score", "roi_heads.mask_predictor.mask_fcn_logits"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_detectors_are_slimmed_as_one_model(case):
    make, classes = CASES[case]
    torch.manual_seed(0)
    model = make().eval()
    graph = wk.trace(model, IMAGES)
    assert graph.cost.searchable_share(graph.vector()) > 0.9
    net = wk.make_supernet(model, "ua", graph=graph, k=4).eval()
    widths = {g: max(1, w // 2) for g, w in graph.full.items()}
    slim = wk.export(net, widths).eval()
    with torch.no_grad():
        expected, got = net.set_widths(widths)(*IMAGES)[0], slim(*IMAGES)[0]
    assert len(got["boxes"])
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    for path in classes:
        before, after = model.get_submodule(path), slim.get_submodule(path)
        assert after.weight.shape[0] == before.weight.shape[0], path
        assert after.weight.shape[1] < before.weight.shape[1], path
    assert sum(p.numel() for p in slim.parameters()) == graph.params(widths)


@pytest.mark.parametrize("name", ["deeplabv3_mobilenet_v3_large"])
def test_segmenters_are_slimmed_as_one_model(name):
    torch.manual_seed(0)
    model = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=5).eval()
    graph = wk.trace(model, (1, 3, 64, 64))
    net = wk.make_supernet(model, "ua", graph=graph, k=4).eval()
    widths = {g: max(1, w // 2) for g, w in graph.full.items()}
    slim = wk.export(net, widths).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(net.set_widths(widths)(x)["out"], slim(x)["out"])
    assert slim(x)["out"].shape == (1, 5, 64, 64)
    assert slim.classifier[4].in_channels < model.classifier[4].in_channels
