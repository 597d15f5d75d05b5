"""``widthkit export`` in other formats, from a run and from a saved network."""

import json

import pytest
import torch
from command import here

import widthkit as wk


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    slim = wk.export(wk.create_model("timm/resnet10t", num_classes=4), {"layer1.0.conv1": 8}).eval()
    path = tmp_path_factory.mktemp("cli") / "slim"
    wk.save(slim, path)
    return slim, path


def test_a_saved_network_in_another_format(saved, tmp_path, monkeypatch, capfd):
    slim, path = saved
    args = ["--format", "pt2", "--dtype", "bf16", "--channels-last", "--fold-bn", "--input", "2,3,32,32"]
    code, out, err = here(capfd, monkeypatch, "export", path, *args, "--out", tmp_path / "b")
    assert (code, out.strip()) == (0, str(tmp_path / "b.pt2")), err
    assert "largest difference" in err
    record = json.loads((tmp_path / "b.pt2.json").read_text())
    assert record["folded_batch_norms"] > 5
    x = torch.randn(3, 3, 32, 32)
    program = torch.export.load(tmp_path / "b.pt2").module()
    assert (program(x.bfloat16()).float() - slim(x)).abs().max() < 0.1 * slim(x).abs().max()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--format", "onx"], "did you mean onnx"),
        (["--format", "pt2", "--widths", "w.json"], "--widths needs the folder of a run"),
        (["--fold-bn"], "cannot be folded"),
    ],
)
def test_refusals_are_one_line(saved, monkeypatch, capfd, args, message):
    code, _, err = here(capfd, monkeypatch, "export", saved[1], *args)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_a_run_in_another_format(tmp_path, monkeypatch, capfd):
    run = tmp_path / "run"
    tiny = ["--data", "digits", "--image-size", "32", "--limit", "40", "--batch-size", "20", "--k", "4"]
    assert here(capfd, monkeypatch, "train", "timm/resnet10t", *tiny, "--epochs", "1", "--out", run)[0] == 0
    widths = tmp_path / "w.json"
    widths.write_text(json.dumps({"layer1.0.conv1": 16, "layer4.0.conv1": 128}))
    code, out, err = here(capfd, monkeypatch, "export", run, "--widths", widths, "--format", "pt2")
    assert (code, out.strip()) == (0, str(run / "slim.pt2")), err
    assert "slim: largest difference from the supernet" in err
    assert "slim.pt2: largest difference from the network itself" in err
