"""Runs that start from trained weights: what they print first, what they store, and what they refuse."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from command import here
from PIL import Image

import widthkit as wk
from widthkit.run.build import build
from widthkit.run.config import RunConfig
from widthkit.run.dense import fresh_model
from widthkit.run.folder import RunFolder
from widthkit.run.given import evaluate_given
from widthkit.train import evaluate, load_data, make_loader

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.mid = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.fc = nn.Linear(8 * 16, classes)

    def forward(self, x):
        return self.fc(self.pool(self.mid(self.bn(self.conv(x)).relu()).relu()).flatten(1))


def ten():
    return Net(10)


def seven():
    return Net(7)


def required(num_classes):
    return Net(num_classes)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model, and weights of it that a short training on the digits gave."""
    path = tmp_path_factory.mktemp("trained")
    (path / "given_net.py").write_text(NET)
    torch.manual_seed(0)
    model = wk.create_model(f"{path}/given_net.py:ten")
    data = load_data("digits", image_size=32, mean=[0.5], std=[0.25])
    wk.train(model, make_loader(data.train, 32, train=True), 2, lr=0.1, progress=False)
    torch.save({"state_dict": {f"module.{n}": t for n, t in model.state_dict().items()}}, path / "w.pth")
    return path


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A copy of that folder, which is the current one."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capfd, monkeypatch, *words, command="train"):
    options = ["--data", "digits", "--epochs", 1, "--limit", 64, "--batch-size", 32, "--k", 2, "--out", "out"]
    return here(capfd, monkeypatch, command, *words, *options)


NORMAL = ("--mean", "0.5", "--std", "0.25")


def test_the_given_weights_are_evaluated_first(folder, capfd, monkeypatch):
    done = run(capfd, monkeypatch, "given_net.py:ten", "--weights", "w.pth", *NORMAL)
    assert done.returncode == 0, done.stderr
    data = load_data("digits", image_size=32, limit=64, mean=[0.5], std=[0.25])
    model = wk.create_model("given_net.py:ten", weights="w.pth")
    truth = evaluate(model, make_loader(data.test, 64, train=False))
    assert truth["accuracy"] > 0.5
    lines = done.stderr.splitlines()
    assert lines[0] == f"dense: {truth['accuracy']:.2%} on 64 test images"
    assert lines[1].startswith("inputs: mean 0.5 0.5 0.5, deviation 0.25 0.25 0.25, 32x32 pixels, crop 1, bilinear")
    assert lines[1].endswith("from the given mean and deviation")
    assert "guessing" not in done.stderr
    stored = json.loads((folder / "out" / "run.json").read_text())
    assert stored["options"]["weights"] == str(folder / "w.pth")
    assert (stored["options"]["mean"], stored["options"]["std"]) == ("0.5", "0.25")


def test_the_supernet_starts_from_the_weights_and_other_networks_do_not(folder):
    config = RunConfig(model="given_net.py:ten", weights="w.pth", data="digits", limit=20, mean="0.5", std="0.25")
    said = []
    built = build(config, RunFolder(folder / "out"), search=False, say=said.append)
    given = wk.create_model("given_net.py:ten", weights="w.pth").eval()
    x = torch.stack([built.data.valid[i][0] for i in range(4)])
    built.net.eval()
    torch.testing.assert_close(built.net.set_widths(built.net.graph.full)(x), given(x))
    fresh = fresh_model(config, built.data, 0)
    assert not torch.equal(fresh.conv.weight, given.conv.weight)
    before = torch.get_rng_state()
    accuracy = evaluate_given(built)
    assert said[0] == f"dense: {accuracy:.2%} on 20 test images"
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_know_nothing_are_remarked(folder, capfd, monkeypatch):
    model = wk.create_model("given_net.py:ten")
    torch.nn.init.zeros_(model.fc.weight)
    torch.save(model.state_dict(), "bad.pth")
    done = run(capfd, monkeypatch, "given_net.py:ten", "--weights", "bad.pth")
    assert done.returncode == 0
    assert "hardly better than guessing; the preprocessing or the order of classes may be wrong" in done.stderr
    assert "from the training images" in done.stderr


def test_a_fresh_head_is_said(folder, capfd, monkeypatch):
    torch.save(wk.create_model("given_net.py:seven").state_dict(), "seven.pth")
    done = run(capfd, monkeypatch, "given_net.py:ten", "--weights", "seven.pth", "--reset-head")
    assert done.returncode == 0
    assert "dense: the weights lack 2 tensors, which are fresh: fc.weight, fc.bias" in done.stderr
    assert "guessing" not in done.stderr


def test_a_run_without_weights_says_its_inputs_only(folder, capfd, monkeypatch):
    done = run(capfd, monkeypatch, "given_net.py:required")
    assert done.returncode == 0
    assert done.stderr.startswith("inputs: mean ")
    assert "dense:" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["given_net.py:ten", "--weights", "none.pth"], "none.pth cannot be read: No such file"),
        (["timm/resnet10t", "--weights", "w.pth"], "w.pth (tensors under 'state_dict') do not fit ResNet: "),
        (["given_net.py:ten", "--weights", "w.pth", "--pretrained"], "--pretrained and --weights exclude each other"),
        (["given_net.py:ten", "--reset-head"], "--reset-head needs --weights"),
        (["given_net.py:ten", "--mean", "0.5"], "--mean needs --std beside it"),
        (["given_net.py:ten", "--mean", "0.5;0.5", "--std", "1"], "--mean '0.5;0.5': write numbers such as 0.485,"),
        (["given_net.py:ten", "--mean", "120", "--std", "50"], "--mean must be shares of 0..1, not 120"),
        (["given_net.py:ten", "--mean", "0,0", "--std", "1,1"], "--mean has 2 values; the model takes 3 channels"),
        (["given_net.py:seven"], "given_net.py:seven gives 7 outputs, digits has 10 classes; let its factory take"),
        (["given_net.py:seven", "--weights", "w.pth"], "only the head differs: --reset-head keeps its fresh weights"),
        (["no_net.py:ten"], "there is no file"),
    ],
)
def test_refusals(folder, capfd, monkeypatch, words, message):
    done = run(capfd, monkeypatch, *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr
    assert not (folder / "out").exists()


def test_a_file_that_has_changed_is_refused(folder, capfd, monkeypatch):
    words = ["given_net.py:ten", "--weights", "w.pth"]
    assert run(capfd, monkeypatch, *words).returncode == 0
    assert run(capfd, monkeypatch, *words, "--resume").returncode == 0
    torch.save(wk.create_model("given_net.py:ten").state_dict(), "w.pth")
    message = "w.pth has changed since the run in out began; restore it, or start another run"
    done = run(capfd, monkeypatch, *words, "--resume")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr
    done = here(capfd, monkeypatch, "search", "out")
    assert done.returncode == 2
    assert message in done.stderr


def test_a_folder_of_images_is_prepared_as_the_weights_want_it(tmp_path, monkeypatch):
    """Size, crop, interpolation and normalisation are those of timm's configuration."""
    images = np.random.default_rng(0).integers(0, 256, (20, 50, 60, 3), dtype=np.uint8)
    for index, image in enumerate(images):
        (tmp_path / "data" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "data" / "ab"[index % 2] / f"{index}.png")
    model = timm.create_model("test_resnet", num_classes=2)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    form = timm.data.resolve_model_data_config(model)
    config = RunConfig(
        model="timm/test_resnet", weights=str(tmp_path / "w.safetensors"), data=f"folder:{tmp_path}/data"
    )
    said = []
    built = build(config, RunFolder(tmp_path / "out"), search=False, say=said.append)
    inputs = built.data.inputs
    assert (inputs.mean, inputs.std) == (pytest.approx(form["mean"]), pytest.approx(form["std"]))
    assert (inputs.size, inputs.crop_pct, inputs.interpolation) == (
        form["input_size"][1:],
        form["crop_pct"],
        form["interpolation"],
    )
    evaluate_given(built)
    assert said[-1].endswith("from timm's data config of test_resnet")
    transform = timm.data.create_transform(**form)
    file = built.data.valid.files[0]
    with Image.open(file) as picture:
        truth = transform(picture.convert("RGB"))
    # One grey level, divided by the smallest deviation.
    assert (built.data.valid[0][0] - truth).abs().max() <= 1.01 / 255 / min(form["std"])
    own_size = build(config.changed({"image_size": 64}), RunFolder(tmp_path / "out"), search=False).data.inputs
    assert (own_size.size, own_size.crop_pct) == ((64, 64), form["crop_pct"])
