"""The comparison of ways to slim a trained network: its count of the cost, and the form that torch-pruning takes."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.recover.ours import Ran
from benchmarks.recover.peer import ConvShortcut
from benchmarks.recover.run import tasks
from benchmarks.recover.setup import Ledger
from benchmarks.recover.table import markdown
from benchmarks.recover.ways import ways
from widthkit.errors import OptionError
from widthkit.supernet import make_supernet
from widthkit.train import make_loader, train


class PaddedBlock(nn.Module):
    """A residual block with He et al.'s option A: every second pixel, zeros for new channels."""

    def __init__(self, inputs, width):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.extra, self.stride = (width - inputs) // 2, 2

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra)))


def test_a_padded_shortcut_as_a_convolution_gives_the_same_outputs():
    block = PaddedBlock(4, 10).double().eval()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(ConvShortcut(block, 4).double()(x), block(x), rtol=0, atol=1e-12)


def test_costs_are_in_epochs_of_the_dense_network():
    ledger = Ledger(SimpleNamespace(train_images=1000), macs=100)
    ledger.trained("supernet", 50, 2000)  # half the network, two epochs
    ledger.ran("judging", 100, 300)  # forwards cost a third
    assert ledger.entries == {"supernet": 1.0, "judging": pytest.approx(0.1)}
    assert ledger.total == pytest.approx(1.1)


def test_the_macs_of_a_supernet_step_are_those_of_the_networks_that_it_runs(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = make_supernet(model, "ua", example_inputs=(1, 1, 4, 4), k=2, min_width="0.5x", n_random=0)
    ran = Ran(net)
    data = [(torch.randn(1, 4, 4), 0) for _ in range(8)]
    train(net, make_loader(data, 4, train=True), 1, progress=False)
    # The largest and the smallest network: 16 pixels, 8 and 4 units between one channel and eight.
    assert ran.mean(tmp_path / "macs.json") == 16 * (8 * 1 + 8 * 8) + 16 * (4 * 1 + 8 * 4)
    assert Ran(net).mean(tmp_path / "macs.json") == ran.macs / ran.images


def test_all_ways_with_one_seed_come_before_the_next_seed():
    made = [task.name for task in tasks(["uniform", "greedy"], [2.1], 2)]
    assert made == ["uniform-2.1x-0", "greedy-2.1x-0", "uniform-2.1x-1", "greedy-2.1x-1"]
    with pytest.raises(OptionError, match="greedy"):
        list(tasks(["greddy"], [2.1], 1))
    assert {way.whose for way in ways().values()} == {"widthkit", "torch-pruning"}


def test_the_table_has_means_and_deviations_over_seeds():
    rows = [
        {"speedup": 2.1, "way": "a", "whose": "w", "test": value, "held_out": 0.95, "final_epochs": 5, "seed": seed}
        for seed, value in enumerate((0.90, 0.92))
    ]
    assert "| 2.1 | a | w | 2 | 5 | 95.00 | 91.00 ± 1.41 |" in markdown(rows, 40, "a network")
