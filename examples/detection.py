"""Object detection: the model returns its own losses while it trains.

Run it with ``python examples/detection.py`` (discs on noise, made here), or with the folder of a Pascal VOC data set
such as BCCD: ``python examples/detection.py path/to/BCCD``; it takes seconds on a CPU. torchvision's detectors take a
list of images and a list of targets, and return a dictionary of losses in training mode, boxes in evaluation mode.
"""

import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.io import read_image
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms.functional import resize

import widthkit as wk
from widthkit.search import Judging

SIZE = 64
CLASSES = ("RBC", "WBC", "Platelets")
Sample = tuple[Tensor, dict[str, Tensor]]


def discs(n: int, seed: int) -> list[Sample]:
    """Return ``n`` images ``[3, 64, 64]`` with two discs each; class 1 is red and large, class 2 green and small."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    samples = []
    for _ in range(n):
        image, boxes = 0.1 * torch.rand(3, SIZE, SIZE, generator=generator), []
        for channel, radius in ((0, 12), (1, 7)):
            row, column = torch.randint(radius, SIZE - radius, (2,), generator=generator).tolist()
            image[channel][(y - row) ** 2 + (x - column) ** 2 < radius**2] = 1.0
            boxes.append([column - radius, row - radius, column + radius, row + radius])
        samples.append((image, {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor([1, 2])}))
    return samples


def voc(folder: Path, part: str, n: int) -> list[Sample]:
    """Read the first ``n`` images of a part of a Pascal VOC data set, shrunk to a width of 64."""
    samples = []
    for name in (folder / "ImageSets" / "Main" / f"{part}.txt").read_text().split()[:n]:
        image = read_image(str(folder / "JPEGImages" / f"{name}.jpg")).float() / 255
        scale = SIZE / image.shape[2]
        boxes, labels = [], []
        for item in ET.parse(folder / "Annotations" / f"{name}.xml").getroot().iter("object"):
            corners = [float(item.findtext(f"bndbox/{k}", "0")) * scale for k in ("xmin", "ymin", "xmax", "ymax")]
            if corners[2] - corners[0] >= 1 and corners[3] - corners[1] >= 1:
                boxes.append(corners)
                labels.append(1 + CLASSES.index(item.findtext("name", "")))
        small = resize(image, [round(image.shape[1] * scale), SIZE], antialias=True)
        samples.append((small, {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels).long()}))
    return samples


def batches(samples: list[Sample], size: int) -> list[Any]:
    """Pair the detectors' two arguments with the targets: ``((images, targets), targets)``."""
    chunks = [samples[i : i + size] for i in range(0, len(samples), size)]
    return [((images, targets), targets) for images, targets in (map(list, zip(*c, strict=True)) for c in chunks)]


def backbone(width: int = 16) -> nn.Sequential:
    """Three strided convolutions; one feature map at an eighth of the resolution."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, width // 2), (width // 2, width), (width, 2 * width)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    body = nn.Sequential(*layers)
    body.out_channels = 2 * width  # torchvision's detectors read this attribute
    return body


def detector(kind: str, classes: int = len(CLASSES) + 1) -> nn.Module:
    """Return torchvision's ``retinanet`` or ``fasterrcnn`` on the small backbone."""
    sizes = {"min_size": SIZE, "max_size": SIZE}
    anchors = AnchorGenerator(sizes=((8, 16, 32),), aspect_ratios=((1.0,),))
    if kind == "retinanet":
        return RetinaNet(backbone(), classes, anchor_generator=anchors, **sizes)
    body = backbone()
    return FasterRCNN(
        body,
        rpn_anchor_generator=anchors,
        box_roi_pool=MultiScaleRoIAlign(["0"], 5, 2),
        box_head=TwoMLPHead(body.out_channels * 25, 64),
        box_predictor=FastRCNNPredictor(64, classes),
        **sizes,
    )


def loss(outputs: dict[str, Tensor], _: Any) -> Tensor:
    """Add up the losses that the model returned."""
    return torch.stack(list(outputs.values())).sum()


def main(folder: str | None = None, kind: str = "retinanet", n: int = 16, epochs: int = 3) -> tuple[float, float]:
    torch.manual_seed(0)
    train = batches(discs(n, 1) if folder is None else voc(Path(folder), "train", n), 8)
    valid = batches(discs(8, 2) if folder is None else voc(Path(folder), "val", 8), 8)

    image = valid[0][0][0][0]
    net = wk.make_supernet(detector(kind), "bc", example_inputs=([image],), k=4, min_width="0.5x")
    history = wk.train(net, train, epochs, loss=loss, optimizer="adamw", lr=2e-3, clip_grad=1.0, progress=False).history
    # These models return losses in training mode only, so networks are judged in that mode.
    result = wk.search(net, valid, "0.6x", "random", loss=loss, judging=Judging(training=True), n=2, progress=False)
    slim = wk.export(net, result)
    wk.recalibrate(slim, train)

    found = slim.eval()([image])[0]
    share = result.macs / result.full["macs"]
    print(f"{share:.0%} of the MACs, loss {history[0]['loss']:.2f} to {history[-1]['loss']:.2f}")
    print(f"{len(found['boxes'])} boxes in the first image")
    with torch.no_grad():
        losses = []
        for model in (net.set_widths(result.units).train(), slim.train()):
            torch.manual_seed(0)  # Faster R-CNN draws the proposals that it learns from
            losses.append(float(loss(model(*valid[0][0]), None)))
    print(f"largest difference between supernet and exported network: {abs(losses[0] - losses[1]):.1e}")
    return history[0]["loss"], history[-1]["loss"]


if __name__ == "__main__":
    main(*sys.argv[1:])
