"""The zoo's command line and its bookkeeping, on the smallest models there are."""

from __future__ import annotations

import json
import os

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.oracles import why_not
from benchmarks.zoo import run as zoo
from benchmarks.zoo.build import build, fill, runs
from benchmarks.zoo.isolated import Allowance, isolated
from benchmarks.zoo.names import model_names
from benchmarks.zoo.one import measure
from benchmarks.zoo.smaller import shorten, small
from benchmarks.zoo.table import failures, markdown, verdict
from widthkit.errors import OptionError


def test_names_patterns_and_shards():
    everything = model_names("torchvision", ["resnet*"])
    parts = [model_names("torchvision", ["resnet*"], f"{i}/3") for i in (1, 2, 3)]
    assert sorted(n for part in parts for n in part) == everything
    assert len(everything) >= 5
    for arguments in (("nowhere",), ("timm", ["no_such_*"]), ("timm", [], "4/3"), ("timm", [], "x")):
        with pytest.raises(OptionError):
            model_names(*arguments)


def test_a_sample_is_drawn_from_both_sources_and_depends_on_the_seed_alone():
    everything = model_names()
    drawn = model_names(sample=50, seed=3)
    assert len(set(drawn)) == 50
    assert set(drawn) < set(everything)
    assert [name for name in everything if name in drawn] == drawn
    assert {name.partition("/")[0] for name in drawn} == {"torchvision", "timm"}
    assert drawn == model_names(sample=50, seed=3) != model_names(sample=50, seed=4)
    parts = [model_names(sample=50, seed=3, shard=f"{i}/2") for i in (1, 2)]
    assert sorted(parts[0] + parts[1]) == sorted(drawn)
    assert model_names("timm", ["test_vit*"], sample=1)[0].startswith("timm/test_vit")
    for sample in (0, len(everything) + 1):
        with pytest.raises(OptionError, match="--sample"):
            model_names(sample=sample)


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
        found = why_not(tiny.model, tiny.inputs)
        assert reason in found
        assert bool(found) == bool(reason)


@pytest.mark.parametrize(
    ("timeout", "memory", "said"), [(0.0, 8.0, "longer than 0 s"), (60.0, 0.001, "more than 0.001 GB")]
)
def test_a_model_that_takes_too_much_is_stopped(timeout, memory, said):
    assert said in isolated("timm/test_resnet", None, Allowance(timeout, memory))["error"]


def test_what_a_peer_breaks_is_the_peers(monkeypatch):
    import torch_pruning

    # A peer that kills its process takes nothing with it: the process is a fork, so only the child sees this.
    monkeypatch.setattr(torch_pruning.pruner, "BasePruner", lambda *_, **__: os._exit(3))
    row = isolated("timm/test_resnet", "torch-pruning", Allowance(120, 8))
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
    arguments = ["zoo", "--source", "timm", "--only", "test_vi*", "--out", str(out)]
    for more, code in (([], 2), (["--resume"], 0)):
        with pytest.raises(SystemExit) as left:
            main(arguments + more)
        assert left.value.code == code
    assert "timm/test_vit" not in asked
    assert asked
    assert "| test_vit |" in (tmp_path / "zoo.md").read_text()
    assert "--resume" in capsys.readouterr().err
