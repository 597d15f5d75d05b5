"""Learning rates, read off the weight of a network whose gradient is always 1."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from widthkit.errors import OptionError
from widthkit.train import train

UPDATES = 8  # per epoch
EPOCHS = 6
LR = 0.5


class Meter(nn.Module):
    """Falls by the learning rate in every update."""

    def __init__(self, losses=()):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.seen, self.progress, self.losses = [], [], losses

    def train_step(self, step):
        self.seen.append(self.weight.item())
        self.progress.append(step.progress)
        step.backward(self.weight.clone())
        return torch.tensor(self.losses[step.epoch] if self.losses else 1.0, dtype=torch.float64)

    def rates(self):
        levels = [*self.seen, self.weight.item()]
        return [before - after for before, after in pairwise(levels)]


class Stream:
    """A loader that does not know its length."""

    def __iter__(self):
        return iter(BATCHES)


BATCHES = [(torch.zeros(1), torch.zeros(1))] * UPDATES


def rates(loader=BATCHES, losses=(), epochs=EPOCHS, **options):
    net = Meter(losses)
    plain = {"optimizer": "momentum", "momentum": 0.0, "weight_decay": 0.0, "lr": LR, "device": "cpu"}
    result = train(net, loader, epochs, progress=False, **{**plain, **options})
    assert [entry["lr"] for entry in result.history] == pytest.approx(net.rates()[::UPDATES], rel=1e-9)
    return net.rates()


def wave(share, floor=0.0):
    return floor + (LR - floor) * (1 + math.cos(math.pi * share)) / 2


# Name -> options, and the rate as a function of the epochs done (a fraction) in closed form.
CASES = {
    "constant": ({"schedule": "constant"}, lambda t: LR),
    "linear": ({"schedule": "linear"}, lambda t: LR * (1 - t / 6)),
    "linear to a floor": ({"schedule": "linear", "min_lr": 0.1}, lambda t: 0.5 - 0.4 * t / 6),
    "cosine": ({"schedule": "cosine"}, lambda t: wave(t / 6)),
    "cosine to a floor": ({"schedule": "cosine", "min_lr": 0.1}, lambda t: wave(t / 6, 0.1)),
    "thirds": ({"schedule": "step", "decay": 0.5}, lambda t: LR * (1 if t < 2 else 0.5 if t < 4 else 0.25)),
    "milestones": (
        {"schedule": "milestones", "milestones": (5, 1, 3), "decay": 0.1},
        lambda t: LR * (1 if t < 1 else 0.1 if t < 3 else 0.01 if t < 5 else 0.001),
    ),
    "a floor under milestones": (
        {"schedule": "milestones", "milestones": (1, 3), "min_lr": 0.02},
        lambda t: LR if t < 1 else 0.05 if t < 3 else 0.02,
    ),
    "exponential": ({"schedule": "exponential", "decay": 0.9}, lambda t: LR * 0.9 ** math.floor(t)),
    # 0.25 and its multiples are exact in binary.
    "exponential by quarters": (
        {"schedule": "exponential", "decay": 0.9, "decay_epochs": 0.25},
        lambda t: LR * 0.9 ** math.floor(4 * t),
    ),
    "warm-up, then cosine": (
        {"schedule": "cosine", "warmup_epochs": 2, "min_lr": 0.1},
        lambda t: LR * (0.01 + 0.99 * t / 2) if t < 2 else wave((t - 2) / 4, 0.1),
    ),
    "warm-up, then linear": (
        {"schedule": "linear", "warmup_epochs": 2},
        lambda t: LR * (0.01 + 0.99 * t / 2) if t < 2 else LR * (6 - t) / 4,
    ),
    "warm-up, then exponential": (
        {"schedule": "exponential", "warmup_epochs": 1, "decay": 0.5},
        lambda t: LR * (0.01 + 0.99 * t) if t < 1 else LR * 0.5 ** (math.floor(t) - 1),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_update_has_the_rate_of_the_closed_form(case):
    options, formula = CASES[case]
    expected = [formula(update / UPDATES) for update in range(EPOCHS * UPDATES)]
    assert rates(**options) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_without_a_known_length_the_rate_changes_between_epochs_only(case):
    options, formula = CASES[case]
    expected = [formula(update // UPDATES) for update in range(EPOCHS * UPDATES)]
    assert rates(Stream(), **options) == pytest.approx(expected, abs=1e-12)


def test_a_fall_comes_with_the_update_also_where_sums_of_floats_fall_short():
    """Three times 0.1 is less than 0.3 in floats."""
    net = Meter()
    plain = {"optimizer": "momentum", "momentum": 0.0, "weight_decay": 0.0, "lr": LR, "device": "cpu"}
    loader = [BATCHES[0]] * 10
    train(net, loader, 1, schedule="exponential", decay=0.5, decay_epochs=0.1, progress=False, **plain)
    assert net.rates() == pytest.approx([LR * 0.5**update for update in range(10)], abs=1e-12)


@pytest.mark.parametrize("patience", [0, 1, 2])
@pytest.mark.parametrize("min_lr", [0.0, 0.02])
def test_a_plateau_is_that_of_torch(patience, min_lr):
    losses = [5.0, 4.0, 4.0, 4.5, 3.0, 3.0, 3.0, 3.0, 3.1, 2.9, 2.9, 2.9, 2.9, 2.9]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    judge = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.2, patience=patience, threshold=0, min_lr=min_lr, eps=0
    )
    expected = []
    for loss in losses:
        expected += [optimizer.param_groups[0]["lr"]] * UPDATES
        judge.step(loss)
    assert len(set(expected)) > 2
    options = {"schedule": "plateau", "patience": patience, "decay": 0.2, "min_lr": min_lr, "epochs": len(losses)}
    assert rates(losses=losses, **options) == pytest.approx(expected, abs=1e-12)


def test_a_plateau_starts_to_fall_after_the_warm_up():
    found = rates(losses=[1.0] * 6, schedule="plateau", patience=0, decay=0.5, warmup_epochs=1)
    assert found[:UPDATES] == pytest.approx([LR * (0.01 + 0.99 * u / UPDATES) for u in range(UPDATES)], abs=1e-12)
    # Epoch 2 is the first without a lower loss than before.
    assert found[UPDATES::UPDATES] == pytest.approx([LR * 0.5**n for n in range(5)], abs=1e-12)


def test_steps_are_told_the_share_of_the_run_that_is_done():
    net, stream = Meter(), Meter()
    train(net, BATCHES, 3, lr=LR, device="cpu", progress=False)
    assert net.progress == pytest.approx([update / 24 for update in range(24)], abs=1e-12)
    train(stream, Stream(), 3, lr=LR, device="cpu", progress=False)
    assert stream.progress == pytest.approx([update // 8 / 3 for update in range(24)], abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "milestones"}, "need each other"),
        ({"milestones": (1,)}, "need each other"),
        ({"min_lr": 0.5}, "min_lr=0.5 is not below lr=0.5"),
        ({"decay": 0}, "decay must be greater than 0"),
        ({"decay_epochs": 0}, "decay_epochs must be greater than 0"),
        ({"warmup_epochs": 6}, "leaves no epoch of 6"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        rates(**options)
