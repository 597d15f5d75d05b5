"""Networks whose blocks merge, from the command line: branches are trained, merged networks are written."""

import json

import pytest
import torch
from command import here
from torch import nn

import widthkit as wk

TINY = ["--data", "digits", "--image-size", "32", "--limit", "40", "--batch-size", "20", "--epochs", "1"]


def test_slim_trains_branches_and_writes_a_merged_network(tmp_path, monkeypatch, capfd):
    out = tmp_path / "run"
    args = ["--merges", "--strategy", "dbc", "--budget", "0.6x", "--init", "inherit", "--final-epochs", "0"]
    code, _, err = here(capfd, monkeypatch, "slim", "timm/repvgg_a0", *TINY, *args, "--out", out)
    assert code == 0, err
    found = json.loads((out / "search.json").read_text())
    # A width per block, where the branches tie a whole stage.
    assert len(found["widths"]) > 20
    slim = wk.load(out / "slim").eval()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in slim.modules())
    assert sum(p.numel() for p in slim.parameters()) == found["params"]
    # The supernet at these units, with its statistics recalibrated, is what was written: exporting says so.
    (tmp_path / "widths.json").write_text(json.dumps(found["widths"]))
    again = tmp_path / "again"
    code, _, err = here(capfd, monkeypatch, "export", out, "--widths", tmp_path / "widths.json", "--out", again)
    assert code == 0, err
    assert "largest difference from the supernet" in err
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(wk.load(again).eval()(x), slim(x))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["timm/resnet10t", "--merges"], "no block with fuse()"),
        (["timm/repvgg_a0", "--merges", "--stages", "2"], "goes with one stage"),
        (["timm/repvgg_a0", "--merges", "--rank", "magnitude"], "cannot be ranked yet"),
    ],
)
def test_what_does_not_merge_is_refused(tmp_path, monkeypatch, capfd, args, message):
    code, _, err = here(capfd, monkeypatch, "slim", *args, *TINY, "--strategy", "dbc", "--out", tmp_path / "run")
    assert (code, err.count("error:")) == (2, 1)
    assert message in err
