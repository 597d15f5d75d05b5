"""Trained weights from files: formats, nestings, prefixes, and what is refused."""

import argparse
import os
import re

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import widthkit as wk
from widthkit.errors import ModelError, OptionError
from widthkit.modules.structure import classifiers
from widthkit.modules.weights import load_weights


class Net(nn.Module):
    def __init__(self, width=4, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)


def state(seed=0, **form):
    torch.manual_seed(seed)
    net = Net(**form)
    nn.init.normal_(net.bn.running_mean)
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def same(model, tensors):
    own = model.state_dict()
    return all(torch.equal(own[name], tensor.to(own[name].dtype)) for name, tensor in tensors.items())


def refused(model, file, **options):
    """Return the message, and make sure that nothing was loaded."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_weights(model, file, **options)
    assert same(model, before)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (lambda s: s, ""),
        (lambda s: {"state_dict": s, "epoch": 3}, "state_dict"),
        (lambda s: {"model": s, "args": argparse.Namespace(lr=0.1)}, "model"),
        (lambda s: {"model": {"state_dict": s}}, "model.state_dict"),
        (lambda s: {"net": s, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}}}, "net"),
        (
            lambda s: {"model_ema": {f"module.{n}": t for n, t in s.items()} | {"n_averaged": torch.tensor(5)}},
            "model_ema",
        ),
        (lambda s: {f"module.{n}": t for n, t in s.items()}, ""),
        (lambda s: {f"_orig_mod.module.{n}": t for n, t in s.items()}, ""),
        (lambda s: {"state_dict": {f"model.{n}": t for n, t in s.items()}}, "state_dict"),
        (lambda s: {n: t for n, t in s.items() if "num_batches" not in n}, ""),
    ],
)
def test_pytorch_files_of_all_forms(tmp_path, wrap, place):
    given = state()
    torch.save(wrap(given), tmp_path / "w.pth")
    model = Net()
    done = load_weights(model, tmp_path / "w.pth")
    learnt = {name: tensor for name, tensor in given.items() if "num_batches" not in name}
    assert same(model, learnt)
    assert (done.place, done.reset) == (place, ())
    assert set(learnt) <= set(done.loaded) <= set(given)


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin"])
def test_safetensors_by_any_name(tmp_path, name):
    given = state()
    safetensors.torch.save_file({f"module.{n}": t for n, t in given.items()}, tmp_path / name)
    model = Net()
    load_weights(model, str(tmp_path / name))
    assert same(model, given)


def test_the_old_format_of_pytorch(tmp_path):
    given = state()
    torch.save({"state_dict": given}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    model = Net()
    load_weights(model, tmp_path / "w.pth")
    assert same(model, given)


def test_of_several_sets_the_first_that_fits_is_taken(tmp_path):
    small, ema, other = state(1, width=5), state(2), state(3)
    torch.save({"state_dict": small, "model_ema": ema, "net": other}, tmp_path / "w.pth")
    model = Net()
    done = load_weights(model, tmp_path / "w.pth")
    assert done.place == "model_ema"
    assert str(done).endswith("under 'model_ema'")
    assert same(model, ema)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_the_models_own_type(tmp_path, dtype):
    given = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state().items()}
    torch.save(given, tmp_path / "w.pth")
    model = Net()
    load_weights(model, tmp_path / "w.pth")
    assert model.conv.weight.dtype == torch.float32
    assert same(model, given)


def test_a_name_with_and_without_prefix_is_no_double(tmp_path):
    """The exact name counts; the other one is an unexpected tensor."""
    given = state()
    torch.save({"module.fc.bias": torch.full((3,), 7.0), **given}, tmp_path / "w.pth")
    assert refused(Net(), tmp_path / "w.pth").endswith("1 unexpected: module.fc.bias")


def test_a_shared_tensor_may_be_stored_once(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    values = {"0.weight": torch.eye(2), "0.bias": torch.ones(2), "1.bias": torch.zeros(2)}
    safetensors.torch.save_file(values, tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model[1].weight, torch.eye(2))


def test_everything_that_differs_is_in_one_message(tmp_path):
    given = state()
    del given["bn.weight"]
    given["extra.scale"] = torch.ones(1)
    given["conv.weight"] = torch.ones(4, 3, 5, 5)
    given["bn.bias"] = torch.tensor([0.0, float("nan"), 0.0, 0.0])
    torch.save({"model": given}, tmp_path / "w.pth")
    message = refused(Net(), tmp_path / "w.pth")
    assert "(tensors under 'model') do not fit Net: " in message
    assert "1 missing: bn.weight; 1 unexpected: extra.scale; " in message
    assert "1 of another shape: conv.weight (4, 3, 5, 5), not (4, 3, 3, 3); 1 not finite: bn.bias" in message


def test_long_lists_are_shortened(tmp_path):
    torch.save({f"layer{i}": torch.ones(1) for i in range(12)}, tmp_path / "w.pth")
    assert "12 unexpected: layer0, layer1, layer2, layer3, layer4 and 7 more" in refused(Net(), tmp_path / "w.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(tmp_path, value):
    given = state()
    given["bn.running_var"][2] = value
    torch.save(given, tmp_path / "w.pth")
    assert refused(Net(), tmp_path / "w.pth").endswith("1 not finite: bn.running_var")


class Harmful:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_file_that_needs_code_is_refused_and_runs_nothing(tmp_path):
    torch.save({"state_dict": state(), "hook": Harmful(tmp_path / "made")}, tmp_path / "w.pth")
    message = refused(Net(), tmp_path / "w.pth")
    assert re.search(r"need code to be read \(\w+\.mkdir\)", message)
    assert not (tmp_path / "made").exists()
    torch.save(Net(), tmp_path / "net.pth")
    assert "store the model's state_dict() alone" in refused(Net(), tmp_path / "net.pth")


def test_files_that_cannot_be_read(tmp_path):
    assert "cannot be read: No such file" in refused(Net(), tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("these are no weights, but a longer text")
    assert "neither safetensors nor a PyTorch file" in refused(Net(), tmp_path / "text.pth")
    torch.save(state(), tmp_path / "w.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:-300])
    assert "neither safetensors nor a PyTorch file" in refused(Net(), tmp_path / "cut.pth")
    safetensors.torch.save_file(state(), tmp_path / "w.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-30])
    assert "are damaged" in refused(Net(), tmp_path / "cut.safetensors")
    torch.save({"epoch": 3, "model": {"name": "x"}}, tmp_path / "empty.pth")
    assert "holds no tensors by name" in refused(Net(), tmp_path / "empty.pth")


# --- heads ------------------------------------------------------------------------------------------------------------


def test_a_head_of_another_size_stays_fresh_on_request(tmp_path):
    torch.save(state(classes=7), tmp_path / "w.pth")
    assert refused(Net(), tmp_path / "w.pth").endswith("only the head differs: reset_head keeps its fresh weights")
    model = Net()
    fresh = model.fc.weight.clone(), model.fc.bias.clone()
    done = load_weights(model, tmp_path / "w.pth", reset_head=True)
    assert done.reset == ("fc.weight", "fc.bias")
    assert str(done).endswith("fresh: fc.weight, fc.bias")
    assert torch.equal(model.fc.weight, fresh[0])
    assert torch.equal(model.fc.bias, fresh[1])
    assert same(model, {n: t for n, t in state(classes=7).items() if not n.startswith("fc")})


def test_no_half_of_a_head_is_loaded(tmp_path):
    """A bias that fits belongs to the weight that does not."""
    given = state()
    given["fc.weight"] = torch.ones(3, 9)
    torch.save(given, tmp_path / "w.pth")
    model = Net()
    assert load_weights(model, tmp_path / "w.pth", reset_head=True).reset == ("fc.weight", "fc.bias")
    assert not torch.equal(model.fc.bias, given["fc.bias"])


def test_a_head_that_fits_is_loaded(tmp_path):
    torch.save(state(), tmp_path / "w.pth")
    model = Net()
    assert load_weights(model, tmp_path / "w.pth", reset_head=True).reset == ()
    assert same(model, state())


def test_a_head_that_is_missing_or_has_other_parts(tmp_path):
    given = {name: tensor for name, tensor in state().items() if not name.startswith("fc")}
    torch.save(given, tmp_path / "w.pth")
    assert load_weights(Net(), tmp_path / "w.pth", reset_head=True).reset == ("fc.weight", "fc.bias")
    torch.save({**given, "module.fc.1.weight": torch.ones(3, 4)}, tmp_path / "w.pth")
    assert load_weights(Net(), tmp_path / "w.pth", reset_head=True).reset == ("fc.weight", "fc.bias")


def test_other_differences_are_refused_with_a_fresh_head_too(tmp_path):
    torch.save(state(width=5, classes=7), tmp_path / "w.pth")
    message = refused(Net(), tmp_path / "w.pth", reset_head=True)
    assert "fc." not in message
    assert "conv.weight (5, 3, 3, 3), not (4, 3, 3, 3)" in message


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "deit_tiny_distilled_patch16_224"])
def test_heads_of_timm(tmp_path, name):
    given = timm.create_model(name, num_classes=7).state_dict()
    safetensors.torch.save_file(given, tmp_path / "w.safetensors")
    model = wk.create_model(f"timm/{name}", num_classes=3, weights=tmp_path / "w.safetensors", reset_head=True)
    heads = model.get_classifier()
    for head in heads if isinstance(heads, (tuple, list)) else [heads]:
        assert head.out_features == 3
    own = model.state_dict()
    differing = {n for n, t in given.items() if t.shape != own[n].shape}
    assert differing
    assert same(model, {n: t for n, t in given.items() if n.rpartition(".")[0] not in classifiers(model)})
    assert all(n.rpartition(".")[0] in classifiers(model) for n in differing)


# --- create_model -----------------------------------------------------------------------------------------------------


def test_weights_of_a_model_by_name(tmp_path):
    given = timm.create_model("resnet10t", num_classes=3).state_dict()
    torch.save({"state_dict": given}, tmp_path / "w.pth")
    assert same(wk.create_model("timm/resnet10t", num_classes=3, weights=tmp_path / "w.pth"), given)
    with pytest.raises(ModelError, match=r"only the head differs: reset_head keeps"):
        wk.create_model("timm/resnet10t", num_classes=4, weights=tmp_path / "w.pth")


def test_options_that_exclude_each_other(tmp_path):
    with pytest.raises(OptionError, match="pretrained=True and weights exclude each other"):
        wk.create_model("timm/resnet10t", pretrained=True, weights=tmp_path / "w.pth")
    with pytest.raises(OptionError, match="reset_head=True needs weights"):
        wk.create_model("timm/resnet10t", reset_head=True)
