"""The detection example on a handful of images."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

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
    few = ["--images", "4", "--epochs", "3", "--slim-epochs", "1", "--candidates", "2", "--side", "96", "--batch", "2"]
    few += ["--windows", "32"]
    rows = example().main(["--data-dir", DATA, "--model", "timm/resnet10t", *few, "--out", str(out)])
    assert [(r["detector"], r["backbone"]) for r in rows] == [
        (kind, name) for kind in ("retinanet", "fasterrcnn") for name in ("searched", "uniform")
    ]
    assert all(r["losses"][-1] < r["losses"][0] for r in rows)
    record = json.loads(out.read_text())
    macs = record["backbone_macs"]
    assert 0.9 * macs["searched"] < macs["uniform"] <= macs["searched"] < 0.6 * macs["dense"]


def test_missing_data_is_said(tmp_path, capsys):
    assert example().main(["--data-dir", str(tmp_path)]) == []
    assert "no BCCD" in capsys.readouterr().err
