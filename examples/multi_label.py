"""Forty yes-or-no labels per image, such as the attributes of a face, with a loss of your own.

Run it with ``python examples/multi_label.py``; it takes seconds on a CPU. The data are made here: each label
says whether a certain pattern was added to the image, so it can be learned.
"""

import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import widthkit as wk

LABELS = 40


def make_data(n: int, seed: int) -> TensorDataset:
    """Return ``n`` images ``[3, 32, 32]`` with ``[40]`` labels of 0 and 1."""
    patterns = torch.randn(LABELS, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(n, LABELS, generator=generator) < 0.5).float()
    coarse = torch.einsum("nl,lchw->nchw", labels - 0.5, patterns) / 3
    noise = 0.3 * torch.randn(n, 3, 32, 32, generator=generator)
    return TensorDataset(F.interpolate(coarse, 32) + noise, labels)


def mean_accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Share of labels that are right, averaged over images and labels."""
    return float(((outputs > 0) == (labels > 0.5)).float().mean())


def main(n: int = 512, epochs: int = 6) -> float:
    torch.manual_seed(0)
    train = DataLoader(make_data(n, seed=1), 64, shuffle=True)
    valid = DataLoader(make_data(256, seed=2), 256)
    loss = F.binary_cross_entropy_with_logits

    model = timm.create_model("test_resnet", num_classes=LABELS)
    net = wk.make_supernet(model, "ua", example_inputs=(1, 3, 32, 32), k=4, min_width="0.5x", n_random=1)
    wk.train(net, train, epochs, loss=loss, optimizer="adamw", lr=3e-3, progress=False)
    result = wk.search(net, valid, "0.6x", "uniform", loss=loss, progress=False)
    slim = wk.export(net, result)
    wk.recalibrate(slim, train)

    images, labels = next(iter(valid))
    with torch.no_grad():
        accuracy = mean_accuracy(slim.eval()(images), labels)
        difference = (net.set_widths(result.units).train()(images) - slim.train()(images)).abs().max()
    print(f"{result.macs / result.full['macs']:.0%} of the MACs, mean accuracy {accuracy:.1%} over {LABELS} labels")
    print(f"largest difference between supernet and exported network: {float(difference):.1e}")
    return accuracy


if __name__ == "__main__":
    main()
