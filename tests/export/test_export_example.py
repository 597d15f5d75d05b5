"""The detection example on a handful of images."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BESIDE = [str(parent / "shared" / "data") for parent in (ROOT.parent, ROOT.parents[1])]
PLACES = [os.environ.get("WIDTHKIT_DATA", ""), *BESIDE]
DATA = next((p for p in PLACES if p and (Path(p) / "bccd" / "BCCD").is_dir()), None)


def example():
    spec = importlib.util.spec_from_file_location("detection_example", ROOT / "examples" / "detection_backbone.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.data
@pytest.mark.skipif(DATA is None, reason="no BCCD beside the checkout; set WIDTHKIT_DATA")
def test_the_detection_example_on_a_handful_of_images(tmp_path):
    out = tmp_path / "detection.json"
    few = ["--images", "4", "--epochs", "6", "--slim-epochs", "1", "--candidates", "2", "--side", "96", "--batch", "2"]
    few += ["--windows", "32"]
    rows = example().main(["--data-dir", DATA, "--model", "timm/resnet10t", *few, "--out", str(out)])
    assert [(r["detector"], r["backbone"]) for r in rows] == [
        (kind, name) for kind in ("retinanet", "fasterrcnn") for name in ("searched", "uniform")
    ]
    assert all(r["losses"][-1] < r["losses"][0] for r in rows)
    record = json.loads(out.read_text())
    assert record["images"] == {"train": 4, "valid": 4, "test": 4}
    assert set(record["accuracy_on_windows"]) == {"searched", "uniform"}
    macs = record["backbone_macs"]
    assert 0.9 * macs["searched"] < macs["uniform"] <= macs["searched"] < 0.6 * macs["dense"]


@pytest.mark.data
@pytest.mark.skipif(DATA is None, reason="no BCCD beside the checkout; set WIDTHKIT_DATA")
def test_the_detection_example_takes_a_resnet50():
    few = ["--images", "2", "--epochs", "1", "--slim-epochs", "1", "--candidates", "1", "--windows", "16"]
    few += ["--side", "64", "--batch", "2", "--seeds", "2", "--detector", "retinanet"]
    rows = example().main(["--data-dir", DATA, "--model", "torchvision/resnet50", *few])
    assert [(r["backbone"], r["seed"]) for r in rows] == [(n, s) for s in (0, 1) for n in ("searched", "uniform")]
    assert rows[0]["losses"] != rows[2]["losses"]


def test_missing_data_is_said(tmp_path, capsys):
    assert example().main(["--data-dir", str(tmp_path)]) == []
    assert "no BCCD" in capsys.readouterr().err


def test_windows_show_the_cell_in_the_middle_and_classes_are_equally_frequent():
    module = example()
    image = torch.zeros(3, 40, 60)
    image[:, 10:14, 20:24] = 1.0  # one cell of class 2
    boxes = torch.tensor([[20.0, 10.0, 24.0, 14.0]])
    samples = [(image, {"boxes": boxes, "labels": torch.tensor([2])})]
    windows = module.Windows(samples, 8, 5, train=False)
    assert sorted(label for _, label in windows) == [0] * 5 + [2] * 5
    middle, edge = (slice(None), slice(2, 6), slice(2, 6)), (slice(None), 0, 0)
    for found, label in windows:
        assert found.shape == (3, 8, 8)
        if label == 2:
            assert (found[middle] > 2).all()
            assert (found[edge] < 0).all()
    shifted = module.Windows(samples, 8, 50, train=True)
    assert len({int((found[0] > 2).nonzero()[0, 1]) for found, label in shifted if label == 2}) > 1
