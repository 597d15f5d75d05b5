"""The command line with a strategy that chooses widths while it trains."""

import json
import sys

import pytest

import widthkit as wk
from widthkit.cli import main

TINY = ["--data", "digits", "--image-size", "32", "--limit", "60", "--batch-size", "30", "--lr", "0.01"]


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["widthkit", *map(str, args)])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code


def test_slim_takes_the_widths_from_training(tmp_path, monkeypatch, capfd):
    out = tmp_path / "run"
    args = ["slim", "timm/resnet10t", *TINY, "--strategy", "dbc", "--budget", "0.4x", "--epochs", "2"]
    assert run(monkeypatch, *args, "--final-epochs", "1", "--init", "inherit", "--out", out) in (0, None)
    assert "policy_macs" in capfd.readouterr().err
    found = json.loads((out / "search.json").read_text())
    assert (found["searcher"], len(found["trials"])) == ("training", 1)
    # The budget became the target, and units are named.
    assert 0.39 * found["full"]["macs"] < found["macs"] <= 0.4 * found["full"]["macs"]
    assert {name: len(units) for name, units in found["units"].items()} == found["widths"]
    assert sum(p.numel() for p in wk.load(out / "slim").parameters()) == found["params"]
    assert run(monkeypatch, "search", out, "--budget", "0.2x", "--resume") == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "target='0.4x'" in error
