"""A ResNet slimmed on images becomes the backbone of RetinaNet and Faster R-CNN, trained on blood cells (BCCD).

The searched backbone is compared with the uniformly shrunk one of the same MACs; both take their weights from the same
supernet. In full, some minutes on a CPU::

    python examples/detection_backbone.py --data-dir DIR --epochs 8 --out benchmarks/detection-backbone.json

``DIR`` holds the folder ``BCCD`` (https://github.com/Shenggan/BCCD_Dataset, Pascal VOC layout).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.io import decode_image
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.transforms.functional import resize

import widthkit as wk
from widthkit.bench.files import write
from widthkit.budget import parse_budget
from widthkit.multiplier import uniform_widths

CLASSES = ("background", "RBC", "WBC", "Platelets")
Sample = tuple[Tensor, dict[str, Tensor]]


def read_bccd(root: Path, part: str, side: int, limit: int | None) -> list[Sample]:
    """Read images ``[3, H, W]`` in 0..1, the longer side ``side`` pixels, with boxes in pixels and labels."""
    names = (root / "ImageSets" / "Main" / f"{part}.txt").read_text().split()[:limit]
    return [_read_one(root, name, side) for name in names]


def _read_one(root: Path, name: str, side: int) -> Sample:
    image = decode_image(str(root / "JPEGImages" / f"{name}.jpg"))
    scale = side / max(image.shape[1:])
    size = [round(n * scale) for n in image.shape[1:]]
    boxes, labels = [], []
    for item in ElementTree.parse(root / "Annotations" / f"{name}.xml").iter("object"):
        box = [float(item.findtext(f"bndbox/{k}") or 0) * scale for k in ("xmin", "ymin", "xmax", "ymax")]
        if box[2] > box[0] + 1 and box[3] > box[1] + 1:
            boxes.append(box)
            labels.append(CLASSES.index(item.findtext("name") or ""))
    pixels = resize(image, size, antialias=True).float() / 255
    return pixels, {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64)}


def slim_backbones(
    model: str, budget: str, side: int, epochs: int, candidates: int
) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """Slim a classifier on handwritten digits; return the searched and the uniform network and what they cost."""
    torch.manual_seed(0)
    data = wk.load_data("digits", image_size=32)
    dense = wk.create_model(model, num_classes=data.num_classes)
    graph = wk.trace(dense, (1, 3, 32, 32))
    net = wk.make_supernet(dense, "bc", graph=graph, k=6, min_width="0.25x")
    loader = wk.make_loader(data.train, 64, train=True)
    wk.train(net, loader, epochs=epochs, lr=0.03, progress=False)
    valid = wk.make_loader(data.valid, 512, train=False)
    result = wk.search(net, valid, budget, searcher="random", n=candidates, progress=False)
    fine = wk.make_supernet(dense, "bc", graph=graph, k=64).space
    widths = {"searched": result.widths, "uniform": uniform_widths(fine, parse_budget(f"{result.macs}MACs", graph))}
    networks = {}
    for name, own in widths.items():
        networks[name] = wk.export(net, {g: min(w, net.space.largest[g]) for g, w in own.items()})
        wk.recalibrate(networks[name], loader)
    macs = {name: wk.trace(slim, (1, 3, side, side)).macs() for name, slim in networks.items()}
    macs["dense"] = wk.trace(dense, (1, 3, side, side)).macs()
    return networks, {"backbone_macs": macs, "widths": widths}


def make_detector(kind: str, slim: nn.Module, side: int) -> nn.Module:
    """Put a feature pyramid and a detection head on a slim classifier."""
    torch.manual_seed(1)
    body = wk.backbone(slim, (2, 3, 4), example_inputs=(1, 3, 64, 64))
    pyramid = BackboneWithFPN(body, body.return_layers, body.channels, 64)  # and a pooled level on top
    size: dict[str, Any] = {"min_size": side * 3 // 4, "max_size": side}
    first = (side // 16, side // 8, side // 4, side // 2)
    if kind == "retinanet":
        octaves = tuple(tuple(round(s * 2 ** (i / 2)) for i in range(2)) for s in first)
        return RetinaNet(pyramid, len(CLASSES), anchor_generator=_anchors(octaves), **size)
    anchors = _anchors(tuple((s,) for s in first))
    return FasterRCNN(pyramid, len(CLASSES), rpn_anchor_generator=anchors, box_detections_per_img=60, **size)


def _anchors(sizes: tuple[tuple[int, ...], ...]) -> AnchorGenerator:
    return AnchorGenerator(sizes, ((0.75, 1.0, 1.33),) * len(sizes))


def train_detector(net: nn.Module, samples: list[Sample], epochs: int, batch: int, lr: float) -> list[float]:
    """Train and return the mean loss of every epoch."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-4)
    steps = epochs * -(-len(samples) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2), pct_start=0.2)
    generator = torch.Generator().manual_seed(2)
    history = []
    net.train()
    for _ in range(epochs):
        order = torch.randperm(len(samples), generator=generator).tolist()
        losses = []
        for start in range(0, len(order), batch):
            images, targets = zip(*(_flipped(samples[i], generator) for i in order[start : start + batch]), strict=True)
            loss = sum(net(list(images), list(targets)).values())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss))
        history.append(sum(losses) / len(losses))
    return history


def _flipped(sample: Sample, generator: torch.Generator) -> Sample:
    image, target = sample
    if torch.rand((), generator=generator) < 0.5:
        return sample
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = image.shape[2] - boxes[:, [2, 0]]
    return image.flip(2), {**target, "boxes": boxes}


def mean_precision(net: nn.Module, samples: list[Sample]) -> dict[str, float]:
    """Return COCO's mAP and mAP at IoU 0.5, by pycocotools through torchmetrics."""
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(backend="pycocotools")
    net.eval()
    with torch.inference_mode():
        for image, target in samples:
            metric.update(net([image]), [target])
    found = metric.compute()
    return {"map": float(found["map"]), "map_50": float(found["map_50"])}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", default=os.environ.get("WIDTHKIT_DATA", "."), help="folder with bccd/ or BCCD/")
    parser.add_argument("--model", default="torchvision/resnet18", help="classifier to slim")
    parser.add_argument("--budget", default="0.5x", help="of the classifier's MACs")
    parser.add_argument("--detector", action="append", choices=("retinanet", "fasterrcnn"), help="both by default")
    parser.add_argument("--slim-epochs", type=int, default=2, help="epochs of the supernet")
    parser.add_argument("--candidates", type=int, default=30, help="networks that the search judges")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of every detector")
    parser.add_argument("--images", type=int, help="most images per part")
    parser.add_argument("--side", type=int, default=160, help="longer side of the images in pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    args = parser.parse_args(arguments)
    found = [p for p in (Path(args.data_dir), Path(args.data_dir) / "bccd") if (p / "BCCD").is_dir()]
    if not found:
        print(f"no BCCD in {args.data_dir}; pass --data-dir", file=sys.stderr)
        return []
    train, test = (read_bccd(found[0] / "BCCD", part, args.side, args.images) for part in ("trainval", "test"))
    backbones, costs = slim_backbones(args.model, args.budget, args.side, args.slim_epochs, args.candidates)
    print(costs["backbone_macs"], flush=True)
    rows = []
    for kind in args.detector or ["retinanet", "fasterrcnn"]:
        for name, slim in backbones.items():
            net = make_detector(kind, slim, args.side)
            before = mean_precision(net, test)
            start = time.perf_counter()
            losses = train_detector(net, train, args.epochs, args.batch, args.lr)
            seconds = time.perf_counter() - start
            row = {"detector": kind, "backbone": name, "losses": losses, "untrained": before, "seconds": seconds}
            rows.append({**row, "trained": mean_precision(net, test)})
            print(
                f"{kind} on {name} {args.model}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, mAP@0.5 "
                f"{before['map_50']:.3f} -> {rows[-1]['trained']['map_50']:.3f}, {seconds:.0f} s",
                flush=True,
            )
            settings = {k: v for k, v in vars(args).items() if k not in ("data_dir", "out")}
            counts = {"train": len(train), "test": len(test)}
            write(args.out, "detection", rows, settings=settings, images=counts, **costs)
    return rows


if __name__ == "__main__":
    main()
