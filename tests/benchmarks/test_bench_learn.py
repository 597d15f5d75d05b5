"""The learning benchmark on a few images: records, resuming, the table."""

import json

import numpy as np
import pytest
import torch

from benchmarks.learn.memory import peak_bytes
from benchmarks.learn.records import Setup
from benchmarks.learn.run import run
from benchmarks.learn.table import kendall, summarise
from benchmarks.learn.widths import choose_widths
from benchmarks.nets import MODELS
from widthkit.errors import OptionError, PluginError
from widthkit.graph.space import uniform_space
from widthkit.registry import PluginChoice
from widthkit.trace import trace

SETUP = Setup(
    "small-resnet", "digits", 128, 64, 64, epochs=1, supernet_epochs=1, n_widths=4, seeds=2, k=4, min_width="0.5x"
)


def bench(out, *labels, part="all", setup=SETUP):
    said = []
    run([setup], [PluginChoice.read(label) for label in labels], None, out, out, part, 2, said.append)
    return said


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("learn")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    said = bench(out, "ua:n_random=0")
    torch.set_num_threads(threads)
    return out, said


def test_every_training_leaves_a_record(finished):
    out, said = finished
    names = {path.name for path in (out / "small-resnet").glob("*.json")}
    dense = {f"dense-{n:02d}-{seed}.json" for n in range(4) for seed in range(2)}
    assert names == {"setup.json", "cost.json", "supernet-ua-n_random-0.json", *dense}
    assert len(said) == 1 + 8 + 1


def test_a_second_run_makes_only_what_is_missing(finished):
    out, _ = finished
    kept = {path: path.read_bytes() for path in (out / "small-resnet").glob("dense-*.json")}
    (victim := out / "small-resnet" / "dense-02-1.json").unlink()
    said = bench(out, "ua:n_random=0", "bcv2")
    assert [line.split(", ")[0] for line in said] == [
        "small-resnet: cost of a step",
        "small-resnet: dense-02-1",
        "small-resnet: supernet-bcv2",
    ]
    again = json.loads(victim.read_text())
    before = json.loads(kept.pop(victim))
    assert all(again[name] == before[name] for name in ("accuracy", "loss", "widths"))
    assert all(path.read_bytes() == data for path, data in kept.items())


def test_the_table_is_what_the_records_say(finished):
    out, _ = finished
    bench(out, "ua:n_random=0", part="table")
    table = json.loads((out / "learn.json").read_text())["rows"][0]
    records = [
        [json.loads((out / "small-resnet" / f"dense-{n:02d}-{seed}.json").read_text()) for seed in range(2)]
        for n in range(4)
    ]
    runs = np.array([[record["accuracy"] for record in pair] for pair in records])
    score = json.loads((out / "small-resnet" / "supernet-ua-n_random-0.json").read_text())["score"]
    row = next(row for row in table["strategies"] if row["strategy"] == "ua:n_random=0")
    assert row["tau"] == kendall(score, runs.mean(1))
    assert row["tau_equal_macs"] == kendall(score[:2], runs[:2].mean(1))
    assert (row["forwards"], row["backwards"]) == (2, 2)
    assert row["peak_bytes"] > 0
    second = next(row for row in table["baselines"] if row["ranking"] == "a second training")
    assert second["tau"] == kendall(runs[:, 0], runs[:, 1])
    assert table["seed_noise"] == pytest.approx(np.sqrt(np.mean((runs[:, 0] - runs[:, 1]) ** 2 / 2)))
    shown = (out / "learn.md").read_text()
    assert all(len(line.split("|")) == 10 for line in shown.splitlines() if line.startswith("|"))
    assert "| macs alone |" in shown


def test_a_part_can_be_measured_anew(finished):
    out, _ = finished
    (out / "small-resnet" / "cost.json").write_text('{"rows": []}')
    assert bench(out, "ua:n_random=0", part="cost") == ["small-resnet: cost of a step, 2 rows"]


def test_other_settings_do_not_mix(finished):
    out, _ = finished
    from dataclasses import replace

    with pytest.raises(OptionError, match="holds records with epochs=1, not 2"):
        bench(out, "ua", setup=replace(SETUP, epochs=2))


def test_refusals_come_before_any_training(tmp_path):
    with pytest.raises(PluginError, match="unknown strategy 'uaa'"):
        bench(tmp_path, "uaa")
    with pytest.raises(OptionError, match="no option 'n'"):
        bench(tmp_path, "ua:n=3")
    with pytest.raises(OptionError, match="unknown part 'costs': did you mean cost"):
        bench(tmp_path, "ua", part="costs")
    with pytest.raises(OptionError, match="NAME:OPTION=VALUE"):
        PluginChoice.read("ua:n")
    assert not list(tmp_path.rglob("dense-*"))


def test_nothing_to_say_before_two_widths_are_trained(tmp_path):
    bench(tmp_path, part="table")
    assert summarise(tmp_path / "small-resnet") is None


@pytest.mark.parametrize("model", MODELS)
def test_widths_of_the_first_half_differ_in_shape_alone(model):
    graph = trace(MODELS[model](), (1, 3, 28, 28))
    space = uniform_space(graph, 8, min_width="0.25x")
    widths, equal = choose_widths(space, 24)
    assert equal == [True] * 12 + [False] * 12
    assert len({tuple(w.values()) for w in widths}) == 24
    shares = graph.macs(widths) / graph.macs()
    assert np.all(np.abs(shares[:12] / 0.4 - 1) <= 0.015)
    assert shares[12:].max() - shares[12:].min() > 0.5
    for w in widths:
        space.encode(w)


def test_small_models_classify():
    for make in MODELS.values():
        assert make(7)(torch.zeros(2, 3, 28, 28)).shape == (2, 7)


def test_peak_memory_by_hand():
    def call():
        a = torch.ones(1_000_000)
        del a
        b = torch.ones(500_000)
        return b + 1

    # The first tensor alone is as large as the two others together; allocators round up a little.
    assert 4_000_000 <= peak_bytes(call) <= 4_100_000
