"""A model of your own, with a branch, a concatenation and a gate: trace it, share its weights, export it.

Run it with ``python examples/own_model.py``; it takes a few seconds on a CPU.
"""

import torch
from torch import Tensor, nn

import widthkit as wk


class Gated(nn.Module):
    """Two branches, concatenated, gated per channel, and classified."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(3, 24, 5, padding=2), nn.BatchNorm2d(24), nn.ReLU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(40, 10, 1), nn.ReLU(), nn.Conv2d(10, 40, 1))
        self.head = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images ``[N, 3, H, W]``; returns ``[N, 10]``."""
        both = torch.cat([self.left(x), self.right(x)], dim=1)
        both = both * torch.sigmoid(self.gate(both))
        return self.head(both.mean(dim=(2, 3)))


def main() -> None:
    torch.manual_seed(0)
    model = Gated()
    graph = wk.trace(model, (1, 3, 32, 32))
    for group in graph.groups.values():
        print(f"{group.name}: {group.width} units at {len(group.sites)} places")

    data = wk.load_data("digits", image_size=32)
    net = wk.make_supernet(model, "ua", graph=graph, k=4)
    wk.train(net, wk.make_loader(data.train, 64, train=True), epochs=3, lr=0.02, progress=False)
    result = wk.search(net, wk.make_loader(data.valid, 512, train=False), "0.6x", progress=False)
    slim = wk.export(net, result)
    print(f"{result.widths}: {graph.macs(result.widths) / graph.macs():.1%} of the MACs")

    # The exported network computes what the supernet computed at these widths.
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        difference = (net.set_widths(result.units).eval()(x) - slim.eval()(x)).abs().max()
    print(f"largest difference between supernet and exported network: {float(difference):.1e}")


if __name__ == "__main__":
    main()
