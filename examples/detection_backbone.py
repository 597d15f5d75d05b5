"""A ResNet is slimmed as a classifier and becomes the backbone of RetinaNet and Faster R-CNN, on blood cells (BCCD).

The classifier learns the classes of windows around single cells, at the scale that the detector will see. It is trained
as a supernet, and searched on windows of other images. The searched network is compared with the uniformly shrunk one
of the same MACs. Both take their weights from the supernet, are trained further as classifiers in the same way, and go
into detectors that are trained in the same way. The whole run takes half an hour of one core (three seeds)::

    python examples/detection_backbone.py --data-dir DIR --seeds 3 --out benchmarks/detection-backbone.json

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
from torch.utils.data import Dataset
from torchvision.io import decode_image
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.transforms.functional import resize

import widthkit as wk
from widthkit.bench.files import write
from widthkit.budget import parse_budget
from widthkit.search.uniform import uniform_widths
from widthkit.train.evaluation import evaluate
from widthkit.train.images import IMAGENET_MEAN, IMAGENET_STD

CLASSES = ("background", "RBC", "WBC", "Platelets")
ANCHORS = ((0.06, 0.16), (0.2, 0.3), (0.3, 0.4), (0.4, 0.5))
"""Sides of the anchor boxes at every level, as shares of the image's longer side.

Platelets take 0.06 of it, red cells 0.16, white cells 0.3. Small anchors need the finest map, or none lies near a cell.
"""
DETECTORS = ("retinanet", "fasterrcnn")
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


class Windows(Dataset[tuple[Tensor, int]]):
    """Square windows of the images with one cell or none in the middle, and the cell's class; 0 is background.

    All classes are equally frequent: an epoch draws ``per_class`` windows of each. Training windows are flipped at
    random and shifted by up to an eighth of their size.
    """

    def __init__(self, samples: list[Sample], window: int, per_class: int, *, train: bool) -> None:
        self.margin, self.window, self.train = window, window, train
        self.images = [_padded(image, window) for image, _ in samples]
        generator = torch.Generator().manual_seed(0)
        places: list[list[tuple[int, int, int]]] = [[] for _ in CLASSES]
        for number, (image, target) in enumerate(samples):
            boxes = target["boxes"]
            centres = (boxes[:, :2] + boxes[:, 2:]) / 2
            for (x, y), label in zip(centres.tolist(), target["labels"].tolist(), strict=True):
                places[label].append((number, round(x), round(y)))
            height, width = image.shape[1:]
            for spot in torch.rand(20, 2, generator=generator) * torch.tensor([width, height]):
                if not len(boxes) or float((centres - spot).norm(dim=1).min()) > window / 3:
                    places[0].append((number, int(spot[0]), int(spot[1])))
        self.items = []
        for label, found in enumerate(places):
            order = torch.randperm(len(found), generator=generator).tolist()
            chosen = [found[order[i % len(order)]] for i in range(per_class if found else 0)]
            self.items += [(*place, label) for place in chosen]
        mixed = torch.randperm(len(self.items), generator=generator).tolist()
        self.items = [self.items[i] for i in mixed]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        number, x, y, label = self.items[index]
        if self.train:
            x, y = (n + int(torch.randint(-self.window // 8, self.window // 8 + 1, ())) for n in (x, y))
        left, top = (n + self.margin - self.window // 2 for n in (x, y))
        found = self.images[number][:, top : top + self.window, left : left + self.window]
        if self.train:
            found = found.flip([dim for dim in (1, 2) if torch.rand(()) < 0.5])
        return found, label


def _padded(image: Tensor, margin: int) -> Tensor:
    """Normalise an image as torchvision's detectors do, and put zeros around it."""
    mean, std = (torch.tensor(v).reshape(3, 1, 1) / 255 for v in (IMAGENET_MEAN, IMAGENET_STD))
    return nn.functional.pad((image - mean) / std, (margin,) * 4)


def slim_backbones(
    args: argparse.Namespace, train: list[Sample], valid: list[Sample]
) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """Slim a classifier of cells; return the searched and the uniform network, trained further, and their costs."""
    window = args.side // 5
    parts = Windows(train, window, args.windows, train=True), Windows(valid, window, args.windows // 4, train=False)
    loader, held_out = wk.make_loader(parts[0], 64, train=True), wk.make_loader(parts[1], 512, train=False)
    torch.manual_seed(0)
    dense = wk.create_model(args.model, num_classes=len(CLASSES))
    shape = (1, 3, args.side * 3 // 4, args.side)
    graph = wk.trace(dense, shape)
    net = wk.make_supernet(dense, "bc", graph=graph, k=6, min_width="0.25x")
    wk.train(net, loader, epochs=args.slim_epochs, lr=0.05, progress=False)
    result = wk.search(net, held_out, args.budget, searcher="random", n=args.candidates, progress=False)
    fine = wk.make_supernet(dense, "bc", graph=graph, k=64).space
    widths = {"searched": result.widths, "uniform": uniform_widths(fine, parse_budget(f"{result.macs}MACs", graph))}
    networks, accuracy = {}, {}
    for name, own in widths.items():
        slim = wk.export(net, {g: min(w, net.space.largest[g]) for g, w in own.items()})
        wk.train(slim, loader, epochs=args.slim_epochs, lr=0.02, progress=False)
        accuracy[name] = evaluate(slim, held_out)["accuracy"]
        networks[name] = slim
    macs = {name: wk.trace(slim, shape).macs() for name, slim in networks.items()} | {"dense": graph.macs()}
    return networks, {"backbone_macs": macs, "accuracy_on_windows": accuracy, "widths": widths}


def make_detector(kind: str, slim: nn.Module, side: int, seed: int) -> nn.Module:
    """Put a feature pyramid and a detection head on a slim classifier."""
    torch.manual_seed(seed)
    body = wk.backbone(slim, (2, 3, 4), example_inputs=(1, 3, 64, 64))
    pyramid = BackboneWithFPN(body, body.return_layers, body.channels, 64)  # it adds a pooled level on top
    anchors = AnchorGenerator(
        tuple(tuple(round(s * side) for s in level) for level in ANCHORS), ((0.75, 1.0, 1.33),) * len(ANCHORS)
    )
    size: dict[str, Any] = {"min_size": side * 3 // 4, "max_size": side}
    if kind == "retinanet":
        return RetinaNet(pyramid, len(CLASSES), anchor_generator=anchors, **size)
    few: dict[str, Any] = {"rpn_post_nms_top_n_train": 300, "rpn_post_nms_top_n_test": 150}
    few |= {"box_batch_size_per_image": 128, "box_detections_per_img": 60}
    head = TwoMLPHead(64 * 7 * 7, 256)  # torchvision's default of 1024 takes longer than this whole backbone
    predictor = FastRCNNPredictor(256, len(CLASSES))
    return FasterRCNN(pyramid, rpn_anchor_generator=anchors, box_head=head, box_predictor=predictor, **few, **size)


def train_detector(net: nn.Module, samples: list[Sample], epochs: int, batch: int, lr: float, seed: int) -> list[float]:
    """Train and return the mean loss of every epoch."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-4)
    steps = epochs * -(-len(samples) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2), pct_start=0.2)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the losses sample boxes at random
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
            losses.append(loss.item())
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
    metric.warn_on_many_detections = False
    net.eval()
    with torch.inference_mode():
        for image, target in samples:
            metric.update(net([image]), [target])
    found = metric.compute()
    return {"map": float(found["map"]), "map_50": float(found["map_50"])}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", default=os.environ.get("WIDTHKIT_DATA", "."), help="folder with bccd/ or BCCD/")
    parser.add_argument(
        "--model", default="torchvision/resnet18", help="classifier to slim, such as torchvision/resnet50"
    )
    parser.add_argument("--budget", default="0.5x", help="of the classifier's MACs")
    parser.add_argument("--detector", action="append", choices=DETECTORS, help="both by default")
    parser.add_argument("--windows", type=int, default=400, help="windows per class that the classifiers learn from")
    parser.add_argument(
        "--slim-epochs", type=int, default=8, help="epochs of the supernet, and of each slim classifier"
    )
    parser.add_argument("--candidates", type=int, default=20, help="networks that the search judges")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of every detector")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of every detector")
    parser.add_argument("--images", type=int, help="most images per part")
    parser.add_argument("--side", type=int, default=160, help="longer side of the images in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    args = parser.parse_args(arguments)
    found = [p for p in (Path(args.data_dir), Path(args.data_dir) / "bccd") if (p / "BCCD").is_dir()]
    if not found:
        print(f"no BCCD in {args.data_dir}; pass --data-dir", file=sys.stderr)
        return []
    train, valid, test = (read_bccd(found[0] / "BCCD", p, args.side, args.images) for p in ("train", "val", "test"))
    backbones, costs = slim_backbones(args, train, valid)
    print(f"MACs {costs['backbone_macs']}, accuracy on windows {costs['accuracy_on_windows']}", flush=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("data_dir", "out")}
    counts = {"train": len(train), "valid": len(valid), "test": len(test)}
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for kind in args.detector or DETECTORS:
            for name, slim in backbones.items():
                row = {"detector": kind, "backbone": name, "seed": seed}
                rows.append(row | _trained(make_detector(kind, slim, args.side, seed), train + valid, test, seed, args))
                print(_line(rows[-1]), flush=True)
                write(args.out, "detection", rows, settings=settings, images=counts, **costs)
    for line in summary(rows):
        print(line)
    return rows


def _trained(
    net: nn.Module, train: list[Sample], test: list[Sample], seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Train a detector; return its losses, and its precision before and after."""
    before = mean_precision(net, test)
    start = time.process_time()
    losses = train_detector(net, train, args.epochs, args.batch, args.lr, seed)
    seconds = time.process_time() - start
    return {"losses": losses, "untrained": before, "trained": mean_precision(net, test), "cpu_seconds": seconds}


def _line(row: dict[str, Any]) -> str:
    losses, before, after = row["losses"], row["untrained"]["map_50"], row["trained"]["map_50"]
    return (
        f"{row['detector']} on the {row['backbone']} backbone, seed {row['seed']}: loss {losses[0]:.3f} -> "
        f"{losses[-1]:.3f}, mAP@0.5 {before:.3f} -> {after:.3f}, {row['cpu_seconds']:.0f} s of one core"
    )


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Return one line per detector and backbone: mean and range over seeds."""
    lines = []
    for pair in dict.fromkeys((row["detector"], row["backbone"]) for row in rows):
        values = [row["trained"]["map_50"] for row in rows if (row["detector"], row["backbone"]) == pair]
        mean = sum(values) / len(values)
        lines.append(f"{pair[0]}, {pair[1]}: mAP@0.5 {mean:.3f} ({min(values):.3f} to {max(values):.3f})")
    return lines


if __name__ == "__main__":
    main()
