"""Several networks trained as one slimmable network with batch norms of their own."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import widthkit as wk
from widthkit.errors import OptionError
from widthkit.export.joint import JointNet
from widthkit.testing import make_step, small_batch, small_graph, small_net


def widths_of(graph, *ratios):
    return [{name: max(1, round(r * w)) for name, w in graph.full.items()} for r in ratios]


def make(**options):
    net = wk.make_supernet(small_net(), "ua", graph=small_graph())
    return JointNet(net, widths_of(net.graph, 0.25, 1.0, 0.5), **options)


def test_statistics_are_private_and_weights_are_shared():
    joint = make()
    before = [[norm.running_mean.clone() for norm in norms] for norms in joint.norms]
    shared = {n: b.clone() for n, b in joint.net.model.named_buffers()}
    joint.switch(2)(small_batch()[0])
    for index, norms in enumerate(joint.norms):
        moved = [not torch.equal(norm.running_mean, b) for norm, b in zip(norms, before[index], strict=True)]
        assert moved == [index == 2] * len(moved)
    assert all(torch.equal(b, shared[n]) for n, b in joint.net.model.named_buffers())
    assert joint.net.model.stem[1].weight.shape == (8,)
    joint.train_step(make_step())
    # Convolutions get gradients from all networks, the supernet's own batch norms from none.
    assert joint.net.model.stem[0].weight.grad is not None
    assert joint.net.model.stem[1].weight.grad is None
    assert all(norm.weight.grad.abs().sum() > 0 for norms in joint.norms for norm in norms)


def test_a_step_is_the_sum_of_the_dense_networks_gradients():
    # Against the exported networks, differentiated on their own.
    joint = make(distill=False)
    images, labels = small_batch()
    expected = torch.zeros_like(joint.net.model.stem[0].weight)
    for dense in joint.networks():
        weight = dense.stem[0].weight
        F.cross_entropy(dense.train()(images), labels).backward()
        expected[: len(weight)] += weight.grad
    joint.train_step(make_step())
    torch.testing.assert_close(joint.net.model.stem[0].weight.grad, expected, rtol=0, atol=1e-12)


def test_the_largest_teaches_the_others():
    joint = make()
    images, labels = small_batch()
    dense = [d.train() for d in joint.networks()]
    teacher = dense[1](images)
    losses = [F.cross_entropy(teacher, labels)]
    soft = teacher.detach().softmax(1)
    losses += [-(soft * dense[i](images).log_softmax(1)).sum(1).mean() for i in (0, 2)]
    expected = torch.zeros_like(joint.net.model.head.weight)
    sum(losses).backward()
    for d in dense:
        expected[:, : d.head.in_features] += d.head.weight.grad
    assert joint.largest == 1
    shown = joint.train_step(make_step())
    assert float(shown) == pytest.approx(losses[0].item(), abs=1e-12)
    torch.testing.assert_close(joint.net.model.head.weight.grad, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("private_affine", [True, False])
def test_trained_jointly_and_exported_as_dense_networks(tmp_path, private_affine):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4, stem_type="", stem_width=8, channels=(8, 12, 16, 24))
    net = wk.make_supernet(model, "ua", example_inputs=(1, 3, 16, 16), max_width="1.5x", min_width="0.15x")
    joint = JointNet(net, widths_of(net.graph, 1.5, 0.15, 0.7), private_affine=private_affine)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 16, 16, generator=generator)
    labels = (images[:, 0].mean((1, 2)) > 0).long()
    batches = list(zip(images.split(32), labels.split(32), strict=True)) * 4
    wk.train(joint, batches, 4, lr=0.05, device="cpu", progress=False, out=tmp_path, clip_grad=5.0)
    joint.eval()
    exported = joint.networks()
    for index, dense in enumerate(exported):
        with torch.no_grad():
            torch.testing.assert_close(dense.eval()(images), joint.switch(index)(images), rtol=1e-4, atol=1e-5)
            # Eval mode, without recalibration: every width has statistics that fit it.
            assert F.cross_entropy(dense(images), labels) < 0.9
    assert exported[0].conv1.out_channels == 96
    assert exported[1].conv1.out_channels == 10
    # A resumed run has the private parts in its checkpoint.
    again = JointNet(
        wk.make_supernet(model, "ua", graph=net.graph, space=net.space),
        widths_of(net.graph, 1.5, 0.15, 0.7),
        private_affine=private_affine,
    )
    wk.train(again, batches, 4, lr=0.05, device="cpu", progress=False, out=tmp_path, resume=True, clip_grad=5.0)
    for a, b in zip(again.norms[1], joint.norms[1], strict=True):
        assert torch.equal(a.running_var, b.running_var)


def test_what_makes_no_sense_is_refused():
    net = wk.make_supernet(small_net(), "ua", graph=small_graph())
    with pytest.raises(OptionError, match="at least one network"):
        JointNet(net, [])
    with pytest.raises(OptionError, match="network 3 does not exist"):
        make().switch(3)
    with pytest.raises(OptionError, match="a list of widths"):
        JointNet(net, {"stem.0": 3})
    with pytest.raises(OptionError, match="made of a supernet, not of Sequential"):
        JointNet(nn.Sequential(), [{}])
    with pytest.raises(OptionError, match=r"has networks of its own.*networks\(\)"):
        wk.export(make())
    with pytest.raises(OptionError, match="JointNet is no supernet"):
        wk.search(make(), [], "0.5x")
