"""The networks that a run writes have the units that its search judged best."""

import json

import torch
from command import here
from safetensors.torch import load_file

import widthkit as wk

TINY = ["--data", "digits", "--image-size", "32", "--limit", "40", "--batch-size", "20", "--k", "4", "--epochs", "1"]
SEARCH = ["--strategy", "bc", "--searcher", "random", "--searcher-option", "n=6", "--seed", "2"]


def test_slim_inherits_the_units_that_were_judged_best(tmp_path, monkeypatch, capfd):
    out, other = tmp_path / "run", tmp_path / "again"
    final = ["--final-epochs", "0", "--init", "inherit"]
    code, _, err = here(capfd, monkeypatch, "slim", "timm/resnet10t", *TINY, *SEARCH, *final, "--out", out)
    assert code == 0, err
    found = json.loads((out / "search.json").read_text())
    first = {name: list(range(width)) for name, width in found["widths"].items()}
    assert found["units"] != first, "or the first path would do; take another seed"
    # Also where the search's network is exported without final trainings.
    (tmp_path / "widths.json").write_text(json.dumps(found["widths"]))
    code, _, err = here(capfd, monkeypatch, "export", out, "--widths", tmp_path / "widths.json", "--out", other)
    assert code == 0, err
    # The first layer reads colours, so its rows alone tell which units they are.
    supernet = load_file(next((out / "supernet").glob("*.safetensors")))
    (name,) = (name for name in supernet if name.endswith("model.conv1.0.weight"))
    for path in (out / "slim", other):
        weight = wk.load(path).state_dict()["conv1.0.weight"]
        assert torch.equal(weight, supernet[name][found["units"]["conv1.0"]])
