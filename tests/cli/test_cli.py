"""The command line as a newcomer meets it: help, one-line errors, the whole job, interruption and resume."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command import here

import widthkit as wk
from widthkit.errors import OptionError
from widthkit.report.run import remarks
from widthkit.run.config import RunConfig
from widthkit.run.folder import RunFolder

ROOT = Path(__file__).parents[2]
TINY = ["--data", "digits", "--image-size", "32", "--limit", "60", "--batch-size", "30", "--k", "4", "--lr", "0.01"]


def widthkit(*args, cwd=None, **kwargs):
    env = {**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(
        [sys.executable, "-m", "widthkit", *map(str, args)],
        capture_output=True, text=True, env=env, cwd=cwd or ROOT, timeout=280, **kwargs,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "slim"
    args = ["slim", "timm/resnet10t", *TINY, "--budget", "0.5x", "--searcher", "uniform", "--epochs", "1"]
    args += ["--final-epochs", "1", "--seeds", "2", "--out", out]
    return out, args, widthkit(*args)


def test_slim_does_the_whole_job(run):
    out, _, done = run
    assert done.returncode == 0, done.stderr
    for name in ("dense", "uniform", "searched"):
        assert name in done.stdout
    for name in ("slim.safetensors", "slim.json", "search.json", "results.json", "widths.png", "report.html"):
        assert (out / name).stat().st_size > 100, name
    results = json.loads((out / "results.json").read_text())
    dense, uniform, searched = results["table"]
    assert 0.4 * dense["macs"] < searched["macs"] <= 0.5 * dense["macs"]
    assert 0.95 * searched["macs"] < uniform["macs"] <= searched["macs"]
    assert all(len(row["accuracy"]) == 2 and row["latency_ms"] > 0 for row in results["table"])


def test_the_saved_network_is_the_searched_one(run):
    out, _, _ = run
    results = json.loads((out / "results.json").read_text())
    slim = wk.load(out / "slim")
    assert sum(p.numel() for p in slim.parameters()) == results["table"][2]["params"]
    graph = wk.trace(slim, (1, 3, 32, 32))
    assert graph.macs() == results["table"][2]["macs"]
    assert slim(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_finished_run_is_not_overwritten_and_resume_repeats_its_result(run, capfd, monkeypatch):
    out, args, _ = run
    before = json.loads((out / "results.json").read_text())
    again = here(capfd, monkeypatch, *args)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "--resume" in again.stderr
    resumed = here(capfd, monkeypatch, *args, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    after = json.loads((out / "results.json").read_text())
    assert [r["accuracy"] for r in after["table"]] == [r["accuracy"] for r in before["table"]]
    other = here(capfd, monkeypatch, *args, "--resume", "--lr", "0.5")
    assert other.returncode == 2
    assert "--lr 0.01" in other.stderr


def test_export_of_a_finished_run_takes_the_trained_network(run, tmp_path, capfd, monkeypatch):
    out, _, _ = run
    files = {p.name: p.read_bytes() for p in out.glob("slim*")}
    done = here(capfd, monkeypatch, "export", out, "--out", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert "trained network" in done.stderr
    trained, again = _weights(out / "slim.safetensors"), _weights(tmp_path / "again.safetensors")
    assert trained.keys() == again.keys()
    assert all(torch.equal(trained[name], again[name]) for name in trained)
    # Another form has a name of its own.
    done = here(capfd, monkeypatch, "export", out, "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    assert _weights(out / "slim-bf16.safetensors")["fc.weight"].dtype == torch.bfloat16
    assert all((out / name).read_bytes() == content for name, content in files.items())


def test_report_draws_from_the_files_alone(run, capfd, monkeypatch):
    out, _, _ = run
    first = (out / "widths.png").read_bytes()
    (out / "widths.png").unlink()
    done = here(capfd, monkeypatch, "report", out)
    assert done.returncode == 0, done.stderr
    assert (out / "widths.png").read_bytes() == first
    page = (out / "report.html").read_text()
    assert "<table>" in page
    assert 'src="data:image/png' in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("search.json", {"widths": "wide"}),
        ("search.json", {"full": 3}),
        ("results.json", {"table": 1}),
        ("results.json", {"widths": 2}),
    ],
)
def test_edited_results_are_refused_in_one_line(run, file, changes, tmp_path, capfd, monkeypatch):
    for name in ("search.json", "results.json"):
        data = json.loads((run[0] / name).read_text())
        (tmp_path / name).write_text(json.dumps({**data, **(changes if name == file else {})}))
    done = here(capfd, monkeypatch, "report", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert file in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "search.json"]


def test_training_alone_asks_for_no_budget(tmp_path, capfd, monkeypatch):
    args = ["train", "timm/resnet10t", *TINY, "--epochs", "1", "--min-width", "0.9x", "--out", tmp_path / "run"]
    done = here(capfd, monkeypatch, *args)
    assert done.returncode == 0, done.stderr


def test_train_search_export_are_the_same_job_in_steps(tmp_path, capfd, monkeypatch):
    def step(*args):
        return here(capfd, monkeypatch, *args)

    out = tmp_path / "run"
    assert step("search", out).returncode == 2
    assert step("train", "timm/resnet10t", *TINY, "--epochs", "1", "--out", out).returncode == 0
    assert "search first" in step("export", out).stderr
    found = step("search", out, "--budget", "0.6x", "--searcher", "random", "--searcher-option", "n=3")
    assert found.returncode == 0, found.stderr
    assert len(json.loads((out / "search.json").read_text())["trials"]) == 3
    done = step("export", out)
    assert done.returncode == 0, done.stderr
    widths = json.loads((out / "search.json").read_text())["widths"]
    slim = wk.load(out / "slim")
    assert slim.layer1[0].conv1.out_channels == widths["layer1.0.conv1"]


def test_interrupted_training_goes_on_where_it_was(tmp_path):
    args = ["train", "timm/resnet10t", *TINY, "--epochs", "3"]
    env = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "widthkit", *args, "--out", str(tmp_path / "a")]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)
    checkpoint = tmp_path / "a" / "supernet" / "checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=120)
    assert checkpoint.exists(), errors
    if running.returncode:  # else it was faster than the signal, and there is nothing to resume
        assert running.returncode == 130
        assert "--resume" in errors.splitlines()[-1]
    assert widthkit(*args, "--out", tmp_path / "a", "--resume").returncode == 0
    assert widthkit(*args, "--out", tmp_path / "b").returncode == 0
    one, other = (_weights(tmp_path / name / "supernet" / "checkpoint.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def _weights(path):
    from safetensors.torch import load_file

    return load_file(path)


BAD = {
    "unknown model": (["trace", "torchvision/resnet81"], "resnet18"),
    "no source": (["trace", "resnet18"], "torchvision/NAME"),
    "bad shape": (["trace", "timm/resnet10t", "--input", "1,3,big"], "--input"),
    "input that does not run": (["trace", "timm/resnet10t", "--input", "1,5,32,32"], "example_inputs"),
    "unknown option": (["slim", "timm/resnet10t", "--dta", "digits"], "--data"),
    "unknown command": (["trac"], "trac"),
    "no such run": (["search", "no-such-folder"], "widthkit train"),
    "unknown strategy": (["train", "timm/resnet10t", *TINY, "--strategy", "cb", "--out", "OUT"], "bc"),
    "unknown strategy option": (
        ["train", "timm/resnet10t", *TINY, "--strategy-option", "x=1", "--out", "OUT"], "complementary",
    ),
    "unknown searcher": (
        ["slim", "timm/resnet10t", *TINY, "--searcher", "gredy", "--out", "OUT"], "did you mean greedy",
    ),
    "unknown data": (["train", "timm/resnet10t", "--data", "digit", "--out", "OUT"], "digits"),
    "missing data": (
        ["train", "timm/resnet10t", "--data", "fashion-mnist", "--data-dir", "nowhere", "--out", "OUT"], "nowhere",
    ),
    "budget too small": (["slim", "timm/resnet10t", *TINY, "--budget", "0.0001x", "--out", "OUT"], "narrowest"),
    "budget with nonsense": (["slim", "timm/resnet10t", *TINY, "--budget", "1ms@cpu,often", "--out", "OUT"], "'often'"),
    "budget on no device": (["slim", "timm/resnet10t", *TINY, "--budget", "1ms@cuda:99", "--out", "OUT"], "cuda:99"),
    "memory too small": (["slim", "timm/resnet10t", *TINY, "--budget", "1kB", "--out", "OUT"], "narrowest"),
    "budget unreadable": (["slim", "timm/resnet10t", *TINY, "--budget", "half", "--out", "OUT"], "0.5x"),
    "unknown searcher option": (["slim", "timm/resnet10t", *TINY, "--searcher-option", "x=1", "--out", "OUT"], "'x'"),
    "searcher option of another type": (
        ["slim", "timm/resnet10t", *TINY, "--searcher", "random", "--searcher-option", "n=abc", "--out", "OUT"], "abc",
    ),
    "unknown optimizer": (["slim", "timm/resnet10t", *TINY, "--optimizer", "sgdd", "--out", "OUT"], "sgdw"),
    "unknown schedule": (["train", "timm/resnet10t", *TINY, "--schedule", "cosin", "--out", "OUT"], "cosine"),
    "precision that the device lacks": (
        ["slim", "timm/resnet10t", *TINY, "--precision", "fp16", "--device", "cpu", "--out", "OUT"], "bf16",
    ),
    "unknown device": (["slim", "timm/resnet10t", *TINY, "--device", "gpu", "--out", "OUT"], "Try --device cpu"),
    "no epoch": (["train", "timm/resnet10t", *TINY, "--epochs", "-1", "--out", "OUT"], "--epochs -1: it must be"),
    "unknown recipe": (["train", "timm/resnet10t", *TINY, "--recipe", "digit", "--out", "OUT"], "did you mean digits?"),
    "missing recipe": (["train", "timm/resnet10t", *TINY, "--recipe", "no.yaml", "--out", "OUT"], "no.yaml"),
    "unknown setting": (["slim", "timm/resnet10t", *TINY, "--set", "final.lrr=1", "--out", "OUT"], "did you mean lr?"),
    "empty batches": (["train", "timm/resnet10t", *TINY, "--batch-size", "0", "--out", "OUT"], "--batch-size 0"),
    "empty input": (["trace", "timm/resnet10t", "--input", "0,3,32,32"], "--input"),
    "negative input": (["trace", "timm/resnet10t", "--input", "1,3,-32,32"], "--input"),
    "bad model option": (["trace", "timm/resnet10t", "--model-option", "depth=3"], "depth"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_gets_one_line_and_nothing_is_written(kind, tmp_path, capfd, monkeypatch):
    args, hint = BAD[kind]
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    done = here(capfd, monkeypatch, *[str(out) if a == "OUT" else a for a in args])
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert hint in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_refusal_leaves_the_process_with_code_2():
    done = widthkit("trace", "torchvision/resnet81")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_trace_prints_groups_and_reasons_and_json(capfd, monkeypatch):
    text = here(capfd, monkeypatch, "trace", "timm/resnet10t").stdout
    assert "layer1.0.conv1" in text
    assert "model output" in text
    data = json.loads(here(capfd, monkeypatch, "trace", "timm/resnet10t", "--json").stdout)
    graph = wk.trace(wk.create_model("timm/resnet10t"))
    assert [(g["name"], g["width"]) for g in data["groups"]] == list(graph.full.items())
    assert data["macs"] == graph.macs()
    assert data["frozen"]["fc.weight[0]"].startswith("model output")


def test_plugins_lists_each_with_one_line(capfd, monkeypatch):
    text = here(capfd, monkeypatch, "plugins").stdout
    for name in ("ua", "bc", "greedy", "random", "uniform"):
        assert sum(f" {name} " in f" {line} " for line in text.splitlines()) >= 1, name


@pytest.mark.parametrize("command", ["trace", "train", "search", "export", "slim", "report", "plugins", "bench"])
def test_every_command_has_help(command, capfd, monkeypatch):
    done = here(capfd, monkeypatch, command, "--help")
    assert done.returncode == 0
    assert "--help" in done.stdout


def test_remarks_name_what_disappoints():
    def row(name, macs, accuracy, latency):
        values = {"accuracy_mean": accuracy, "accuracy_std": 0.01, "latency_ms": latency}
        return {"network": name, "macs": macs, **values}

    good = {"table": [row("dense", 100, 0.9, 10), row("uniform", 50, 0.8, 6), row("searched", 50, 0.85, 5)]}
    assert remarks(good) == []
    bad = {"table": [row("dense", 100, 0.9, 10), row("uniform", 50, 0.85, 6), row("searched", 50, 0.8, 11)]}
    assert any("not faster" in r for r in remarks(bad))
    assert any("more accurate" in r for r in remarks(bad))


def test_a_folder_is_claimed_by_results_and_not_by_a_failed_start(tmp_path):
    folder = RunFolder(tmp_path / "run")
    first = RunConfig(model="timm/resnet10t", data="digits", lr=50.0)
    folder.begin(first, "train", resume=False)
    second = first.changed({"lr": 0.01})
    folder.begin(second, "train", resume=False)  # nothing but options was there
    assert folder.config().lr == 0.01
    checkpoint = tmp_path / "run" / "supernet" / "checkpoint.safetensors"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"weights")
    with pytest.raises(OptionError, match="already holds a run"):
        folder.begin(first, "train", resume=False)
    with pytest.raises(OptionError, match=r"lr=0\.01"):
        folder.begin(first, "train", resume=True)


# --- stages -----------------------------------------------------------------------------------------------------------


def test_a_search_in_stages_on_the_command_line(tmp_path, capfd, monkeypatch):
    out = tmp_path / "staged"
    data = ["--data", "digits", "--image-size", "16", "--limit", "60", "--batch-size", "30", "--lr", "0.01"]
    options = ["--bins", "2", "--min-width", "2", "--divisor", "2", "--fix", "3=20", "--epochs", "1"]
    done = here(capfd, monkeypatch, "train", "benchmarks.nets:plain_cnn", *data, *options, "--out", out)
    assert done.returncode == 0, done.stderr
    search = ["search", out, "--budget", "0.5x,0.7x", "--searcher", "random", "--searcher-option", "n=3"]
    search += ["--stages", "2", "--alpha", "2"]
    done = here(capfd, monkeypatch, *search)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "search.json").read_text())
    assert found["widths"]["3"] == 20
    assert [row["beta"] for row in found["settings"]["stages"]] == [2.0, 1.0]
    assert 0.97 * 0.5 * found["full"]["macs"] < found["macs"] <= 0.5 * found["full"]["macs"]
    assert here(capfd, monkeypatch, *search).returncode == 2  # a search is there already
    resumed = here(capfd, monkeypatch, *search, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((out / "search.json").read_text()) == found
    done = here(capfd, monkeypatch, "export", out)
    assert done.returncode == 0, done.stderr
    slim = wk.load(out / "slim", allow=["benchmarks.nets:plain_cnn"])
    assert sum(p.numel() for p in slim.parameters()) == found["params"]


def test_a_trained_network_is_pruned_in_stages_on_the_command_line(tmp_path, capfd, monkeypatch):
    """No bins: budgets fall by equal ratios, units are ranked at every stage, widths only shrink."""
    out = tmp_path / "iterative"
    data = ["--data", "digits", "--image-size", "16", "--limit", "60", "--batch-size", "30", "--lr", "0.01"]
    options = ["--strategy", "whole", "--rank", "taylor", "--rank-images", "20", "--epochs", "1", "--final-epochs", "0"]
    search = ["--stages", "3", "--budget", "0.4x", "--searcher", "importance"]
    command = ["slim", "benchmarks.nets:plain_cnn", *data, *options, *search, "--out", out]
    done = here(capfd, monkeypatch, *command)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "search.json").read_text())
    rows, dense = found["settings"]["stages"], found["full"]["macs"]
    for number, row in enumerate(rows, start=1):
        assert row["beta"] is None
        assert 0.97 * dense * 0.4 ** (number / 3) < row["macs"] <= dense * 0.4 ** (number / 3)
    for before, after in itertools.pairwise(rows):
        assert all(after["widths"][name] <= width for name, width in before["widths"].items())
    assert found["macs"] == rows[-1]["macs"]
    assert here(capfd, monkeypatch, *command, "--resume").returncode == 0
    assert json.loads((out / "search.json").read_text()) == found


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--stages", "3", "--alpha", "0"], "--alpha 0.0: it must be above 0"),
        (["--bins", "0"], "--bins 0.0: it must be above 0"),
        (["--precision", "fp16", "--device", "cpu"], "--precision fp16 cannot be used on a CPU"),
        (["--data", "cifar10"], "cifar10 needs --data-dir, the folder"),
        (["--data", "cifar10", "--data-dir", "nowhere"], "pass --data-dir, the folder"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--search-memory", "2XB"], "error: --search-memory 2XB: this is no amount"),
        (["--searcher", "random", "--searcher-option", "n=0"], "error: n=0: random search needs at least one draw"),
    ],
    ids=str,
)
def test_refusals_name_the_options_that_people_write(options, named, tmp_path, capfd, monkeypatch):
    slim = ["slim", "benchmarks.nets:plain_cnn", "--data", "digits", "--limit", "60", "--out", tmp_path / "out"]
    done = here(capfd, monkeypatch, *slim, *options)
    assert done.returncode == 2
    assert named in done.stderr
    assert len(done.stderr.splitlines()) == 1
