"""An image-to-image generator with instance norm and transposed convolutions, trained with an L1 loss.

Run it with ``python examples/image_to_image.py``; it takes seconds on a CPU. The task is to sharpen and invert the
handwritten digits that come with scikit-learn.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import widthkit as wk


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *_layer(nn.Conv2d(width, width, 3, padding=1)), nn.Conv2d(width, width, 3, padding=1)
        )
        self.norm = nn.InstanceNorm2d(width, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape ``[N, C, H, W]``."""
        return x + self.norm(self.block(x))


def _layer(conv: nn.Module) -> list[nn.Module]:
    return [conv, nn.InstanceNorm2d(conv.out_channels, affine=True), nn.ReLU()]


def generator(width: int = 16) -> nn.Module:
    """Down, two residual blocks, up again (the generator of CycleGAN, small)."""
    return nn.Sequential(
        *_layer(nn.Conv2d(1, width, 7, padding=3)),
        *_layer(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)),
        Residual(2 * width),
        Residual(2 * width),
        *_layer(nn.ConvTranspose2d(2 * width, width, 3, stride=2, padding=1, output_padding=1)),
        nn.Conv2d(width, 1, 7, padding=3),
        nn.Sigmoid(),
    )


def main(n: int = 320, epochs: int = 3) -> float:
    torch.manual_seed(0)
    sharp = F.interpolate(torch.from_numpy(load_digits().images / 16).float()[:, None], 16, mode="bilinear")
    pairs = TensorDataset(F.avg_pool2d(sharp, 3, 1, 1), 1 - sharp)
    train = DataLoader(torch.utils.data.Subset(pairs, range(n)), 32, shuffle=True)
    valid = DataLoader(torch.utils.data.Subset(pairs, range(1500, 1628)), 128)

    net = wk.make_supernet(generator(), "bc", example_inputs=(1, 1, 16, 16), k=4, min_width="0.25x")
    wk.train(net, train, epochs, loss=F.l1_loss, optimizer="adamw", lr=3e-3, progress=False)
    result = wk.search(net, valid, "0.5x", "uniform", loss=F.l1_loss, progress=False)
    slim = wk.export(net, result)

    images, targets = next(iter(valid))
    with torch.no_grad():
        error = float(F.l1_loss(slim.eval()(images), targets))
        difference = (net.set_widths(result.units).eval()(images) - slim(images)).abs().max()
    print(f"{result.macs / result.full['macs']:.0%} of the MACs, L1 error {error:.3f}")
    print(f"largest difference between supernet and exported network: {float(difference):.1e}")
    return error


if __name__ == "__main__":
    main()
