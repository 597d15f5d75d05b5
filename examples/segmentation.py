"""Semantic segmentation: a class for every pixel, from a model that returns a dictionary.

Run it with ``python examples/segmentation.py``; it takes seconds on a CPU. The images are made here: squares and discs
on noise. torchvision's segmentation models return ``{"out": logits}``; widthkit's default loss reads that entry.
"""

import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import widthkit as wk

SIZE = 64


def make_data(n: int, seed: int) -> TensorDataset:
    """Return ``n`` images ``[3, 64, 64]`` with masks ``[64, 64]``: 0 nothing, 1 square (red), 2 disc (green)."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    images, masks = 0.5 * torch.randn(n, 3, SIZE, SIZE, generator=generator), torch.zeros(n, SIZE, SIZE).long()
    for image, mask in zip(images, masks, strict=True):
        for kind in (1, 2):
            row, column, radius = torch.randint(10, 54, (3,), generator=generator).tolist()
            radius = 6 + radius // 6
            inside = (y - row).abs().maximum((x - column).abs()) < radius
            if kind == 2:
                inside = (y - row) ** 2 + (x - column) ** 2 < radius**2
            mask[inside] = kind
            image[kind - 1][inside] += 2
    return TensorDataset(images, masks)


def main(n: int = 32, epochs: int = 8) -> float:
    torch.manual_seed(0)
    train = DataLoader(make_data(n, seed=1), 16, shuffle=True)
    valid = DataLoader(make_data(16, seed=2), 16)

    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    net = wk.make_supernet(model, "bc", example_inputs=(1, 3, SIZE, SIZE), k=4, min_width="0.5x")
    wk.train(net, train, epochs, optimizer="adamw", lr=3e-3, progress=False)
    result = wk.search(net, valid, "0.6x", "random", n=2, progress=False)
    slim = wk.export(net, result)

    images, masks = next(iter(valid))
    with torch.no_grad():
        out = slim.train()(images)["out"]
        difference = (net.set_widths(result.units).train()(images)["out"] - out).abs().max()
    # Most pixels are background, so accuracy is averaged over classes.
    right = (out.argmax(1) == masks).float()
    accuracy = float(torch.stack([right[masks == kind].mean() for kind in range(3)]).mean())
    print(f"{result.macs / result.full['macs']:.0%} of the MACs, {accuracy:.1%} right, mean over classes")
    print(f"largest difference between supernet and exported network: {float(difference):.1e}")
    return accuracy


if __name__ == "__main__":
    main()
