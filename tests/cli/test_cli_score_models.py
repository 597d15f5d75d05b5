"""Score models from the command line: calibration by short trainings, and resuming them."""

import json
from functools import partial

import pytest
from command import here

TINY = ["--data", "digits", "--image-size", "32", "--limit", "40", "--batch-size", "20", "--k", "3", "--lr", "0.01"]


@pytest.fixture
def widthkit(capfd, monkeypatch):
    return partial(here, capfd, monkeypatch)


def test_a_calibrated_search_trains_by_design_and_resumes_to_the_same_bytes(widthkit, tmp_path):
    out = tmp_path / "run"
    assert widthkit("train", "timm/resnet10t", *TINY, "--epochs", "1", "--out", out).returncode == 0
    options = [f"--searcher-option={option}" for option in ("proposals=random", "evaluations=4", "calibrate=2")]
    search = ["search", out, "--searcher", "guided", *options, "--stand-alone-epochs", "1"]
    done = widthkit(*search)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("stand-alone training: ") == 2
    before = (out / "search.json").read_bytes()
    found = json.loads(before)
    assert len(found["trials"]) <= 5
    assert len(found["settings"]["prediction"]["calibrations"]) == 2
    assert all(0 <= accuracy <= 1 for _, accuracy in found["settings"]["prediction"]["calibrations"])
    journal = out / "search-journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert sum("stand-alone" in line for line in lines) == 2
    journal.write_text("".join(lines[:2]))  # killed after the first training
    again = widthkit(*search, "--resume")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("stand-alone training: ") == 1
    assert (out / "search.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["model=log-liner"], "did you mean log-linear"),
        (["calibrate=1"], "calibrate=1: "),
        (["evaluations=1"], "evaluations=1: "),
        (["proposals=gredy"], "did you mean greedy"),
        (['model_options={"depth": 3}'], "has no option 'depth'"),
        (["depth=3"], "has no option 'depth'"),
    ],
    ids=str,
)
def test_bad_options_are_refused_before_anything_is_trained(widthkit, options, hint, tmp_path):
    given = [f"--searcher-option={option}" for option in options]
    done = widthkit("slim", "timm/resnet10t", *TINY, "--searcher", "guided", *given, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert hint in done.stderr
    assert not (tmp_path / "run").exists()
