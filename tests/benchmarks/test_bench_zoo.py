"""The zoo's command line and its bookkeeping, on the smallest models there are."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch

from benchmarks.oracles import cut
from benchmarks.zoo import run as zoo
from benchmarks.zoo.build import build, fill, runs, shorten, small
from benchmarks.zoo.names import model_names
from benchmarks.zoo.one import measure
from benchmarks.zoo.table import failures, markdown, verdict
from widthkit.cli import main
from widthkit.errors import OptionError


def test_names_patterns_and_shards():
    everything = model_names("torchvision", ["resnet*"])
    parts = [model_names("torchvision", ["resnet*"], f"{i}/3") for i in (1, 2, 3)]
    assert sorted(n for part in parts for n in part) == everything
    assert len(everything) >= 5
    for arguments in (("nowhere",), ("timm", ["no_such_*"]), ("timm", [], "4/3"), ("timm", [], "x")):
        with pytest.raises(OptionError):
            model_names(*arguments)


def test_a_model_passes_and_its_row_says_so():
    row = list(measure("timm/test_resnet"))[-1]
    assert verdict(row) == "pass"
    assert row["stage"] == "done"
    assert {row["oracles"][n] for n in ("shrink", "macs", "permutation", "same_net", "cut", "fvcore")} == {"pass"}
    assert row["searchable_macs_share"] > 0.95
    assert row["params"] == sum(p.numel() for p in build("timm/test_resnet").parameters())


def test_building_without_initialising_changes_no_shape_and_draws_no_random_number():
    state = torch.get_rng_state()
    model = fill(build("timm/test_vit"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_shortened_models_still_run():
    tiny = small("torchvision/resnet101")
    assert "fewer" in tiny.how
    assert runs(tiny.model, tiny.inputs)
    assert shorten(tiny.model) == 0


def test_the_cut_oracle_knows_its_limits():
    for name, reason in (("timm/test_resnet", ""), ("timm/test_vit", "mixes"), ("timm/test_nfnet", "before use")):
        tiny = small(name)
        assert reason in cut.why_not(tiny.model, tiny.inputs)
        assert bool(cut.why_not(tiny.model, tiny.inputs)) == bool(reason)


@pytest.mark.parametrize(
    ("timeout", "memory", "said"), [(0.0, 8.0, "longer than 0 s"), (60.0, 0.001, "more than 0.001 GB")]
)
def test_a_model_that_takes_too_much_is_stopped(timeout, memory, said):
    assert said in zoo.isolated("timm/test_resnet", None, timeout, memory)["error"]


def test_what_a_peer_breaks_is_the_peers(monkeypatch):
    monkeypatch.setattr("benchmarks.zoo.one.halved_by", lambda *_: os._exit(3))
    row = zoo.isolated("timm/test_resnet", "torch-pruning", 120, 8)
    assert "error" not in row
    assert row["peer"]["error"] == "the process died (exit code 3)"
    assert 0 < row["peer"]["own_seconds"] < row["seconds"] + 1
    assert verdict(row) == "pass"
    assert "the process died (exit code 3)" in markdown([row], "timm", {})
    del row["peer"]["own_seconds"]
    assert "not compared" in markdown([row], "timm", {})


def test_the_table_names_who_misses_a_bar():
    rows = [
        {
            "model": "timm/good",
            "stage": "done",
            "oracles": {"macs": "pass", "fvcore": "1 counted"},
            "trace_cpu_seconds": 1.0,
        },
        {"model": "timm/bad", "stage": "done", "oracles": {"permutation": "off by 1"}, "searchable_macs_share": 0.5},
        {"model": "timm/slow", "stage": "done", "params": 5, "trace_cpu_seconds": 11.0, "frozen": {"a|b": 1}},
    ]
    page = markdown(rows, "timm", {})
    assert [bool(failures(r)) for r in rows] == [False, True, False]
    assert "- timm/bad: permutation: off by 1; 50.0% of MACs searchable" in page
    assert "- timm/slow: trace takes 11.0 s" in page
    assert "- timm/good" not in page


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    out = tmp_path / "zoo.jsonl"
    out.write_text(json.dumps({"model": "timm/test_vit", "stage": "done", "seconds": 1}) + '\n{"torn": ')
    asked = []
    monkeypatch.setattr(zoo, "isolated", lambda name, *_: asked.append(name) or {"model": name, "seconds": 1})
    argv = ["widthkit", "bench", "zoo", "--source", "timm", "--only", "test_vi*", "--out", str(out)]
    for more, code in (([], 2), (["--resume"], 0)):
        monkeypatch.setattr(sys, "argv", argv + more)
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == code
    assert "timm/test_vit" not in asked
    assert asked
    assert "| test_vit |" in (tmp_path / "zoo.md").read_text()
    assert "--resume" in capsys.readouterr().err
