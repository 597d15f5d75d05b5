import numpy as np
import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from widthkit.errors import DataError, OptionError
from widthkit.train import batch_statistics, recalibrate


def batches(count, size=6, channels=3, seed=0, edge=4):
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(2, 3, size=(size, channels, edge, edge)) for _ in range(count)]
    return arrays, [(torch.tensor(array), torch.zeros(size)) for array in arrays]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}, [m.training for m in model.modules()]


def unchanged(before, model):
    after = state(model)
    return after[1] == before[1] and all(torch.equal(after[0][name], value) for name, value in before[0].items())


@pytest.mark.parametrize("make", [nn.BatchNorm2d, BatchNormAct2d])
def test_recalibration_is_the_mean_over_batches(make):
    arrays, loader = batches(5)
    norm = make(3, momentum=0.3).double()
    norm.running_mean.fill_(99)
    assert recalibrate(norm, loader) == 30
    joint = np.stack(arrays)
    mean = joint.mean(axis=(1, 3, 4)).mean(axis=0)
    variance = joint.transpose(0, 2, 1, 3, 4).reshape(5, 3, -1).var(axis=2, ddof=1).mean(axis=0)
    np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(norm.running_var.numpy(), variance, rtol=1e-12)
    assert norm.momentum == 0.3
    assert norm.training


def test_equal_batches_give_the_mean_of_all_images():
    arrays, loader = batches(4)
    norm = nn.BatchNorm2d(3).double()
    recalibrate(norm, loader, batches=3)
    np.testing.assert_allclose(norm.running_mean.numpy(), np.concatenate(arrays[:3]).mean(axis=(0, 2, 3)), rtol=1e-12)


def test_other_modules_are_in_eval_mode_and_nothing_needs_gradients():
    _, loader = batches(2)
    seen = []
    norm, dropout = nn.BatchNorm2d(3).double(), nn.Dropout(0.9)
    dropout.register_forward_hook(lambda m, i, o: seen.append((m.training, o.requires_grad, torch.equal(i[0], o))))
    net = nn.Sequential(dropout, norm)
    net.train()
    norm.eval()
    recalibrate(net, loader)
    assert seen == [(False, False, True)] * 2
    assert dropout.training
    assert not norm.training


def test_layers_without_running_statistics_are_left_alone():
    _, loader = batches(2)
    bare = nn.BatchNorm2d(3, track_running_stats=False).double()
    assert recalibrate(bare, loader) == 0
    net = nn.Sequential(bare, nn.BatchNorm2d(3).double())
    assert recalibrate(net, loader) == 12
    with batch_statistics(net):
        net(loader[0][0])
    assert bare.running_mean is None


def test_a_last_batch_of_one_is_left_out():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3)).double()
    _, loader = batches(2)
    assert recalibrate(net, [*loader, (loader[0][0][:1], None)]) == 12


@pytest.mark.parametrize("failure", ["stop", "empty", "odd"])
def test_a_failed_recalibration_changes_nothing(failure):
    _, loader = batches(3)

    def broken():
        yield loader[0]
        raise KeyboardInterrupt

    net = nn.Sequential(nn.BatchNorm2d(3, momentum=0.2).double(), nn.Dropout().eval())
    net[0].running_mean.fill_(5)
    before = state(net)
    bad, error = {
        "stop": (broken(), KeyboardInterrupt),
        "empty": ([], DataError),
        "odd": ([loader[0], torch.zeros(3)], DataError),
    }[failure]
    with pytest.raises(error):
        recalibrate(net, bad)
    assert unchanged(before, net)
    assert net[0].momentum == 0.2


def test_batch_statistics_are_the_batch_s_own():
    torch.manual_seed(0)
    arrays, loader = batches(1)
    net = nn.Sequential(nn.BatchNorm2d(3, affine=False, eps=1e-3).double(), nn.Dropout(0.5))
    before = state(net)
    with batch_statistics(net):
        out = net(loader[0][0]).numpy()
    x = arrays[0]
    truth = (x - x.mean(axis=(0, 2, 3), keepdims=True)) / np.sqrt(x.var(axis=(0, 2, 3), keepdims=True) + 1e-3)
    np.testing.assert_allclose(out, truth, rtol=1e-10, atol=1e-12)
    assert unchanged(before, net)


def test_batch_statistics_are_put_back_after_an_error_and_infinite_inputs():
    net = timm.create_model("test_byobnet", num_classes=3).eval()
    net.train()
    net.head.eval()
    before = state(net)

    def use(value):
        with batch_statistics(net):
            net(torch.full((2, 3, 32, 32), value))
            raise RuntimeError("stop")

    for value in (1.0, float("inf")):
        with pytest.raises(RuntimeError, match="stop"):
            use(value)
        assert unchanged(before, net)


def test_options_are_checked():
    with pytest.raises(OptionError, match="batches=0"):
        recalibrate(nn.BatchNorm2d(3), [], batches=0)
    with pytest.raises(OptionError, match="device='nonsense'"):
        recalibrate(nn.BatchNorm2d(3), [], device="nonsense")
