"""``python -m benchmarks NAME``: every benchmark runs at its smallest, and refusals are one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import benchmarks
from benchmarks.__main__ import main
from benchmarks.common import ask_and_tell, timed
from benchmarks.search import SyntheticScore, small_spaces
from widthkit.budget import parse_budget
from widthkit.search.searcher import SEARCHERS

ROOT = Path(benchmarks.__file__).parent
NAMES = ["cost", "zoo", "fuzz", "predict", "strategy-memory", "learn", "greedy", "search", "score-model"]


def leave(*arguments):
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return left.value.code


def rows_of(path):
    record = json.loads(path.read_text())
    assert {"benchmark", "date", "versions", "machine", "rows"} <= set(record)
    return record["rows"]


def three_convolutions(num_classes=3):
    layers = nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


MODEL = f"{__name__}:three_convolutions"


def test_help_lists_every_benchmark(capsys):
    assert leave("--help") == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_has_help(name, capsys):
    assert leave(name, "--help") == 0
    assert "--out" in capsys.readouterr().out


def test_refusals_are_one_line(tmp_path, capsys):
    for arguments, hint in (
        (("score-model", "--data-dir", tmp_path), "--data-dir"),
        (("zoo", "--sample", "0", "--out", "-"), "--sample 0"),
        (("learn", "--part", "costs"), "did you mean cost"),
    ):
        assert leave(*arguments) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        assert hint in line


def test_cost_writes_a_file_and_leaves_the_committed_one_alone(tmp_path, capsys):
    arguments = ("cost", "--model", MODEL, "--vectors", "10")
    before = (ROOT / "cost.json").read_bytes()
    assert leave(*arguments, "--out", tmp_path / "cost.json") == 0
    assert rows_of(tmp_path / "cost.json")[0]["vectors"] == 10
    assert leave(*arguments, "--out", "-") == 0
    assert capsys.readouterr().out.count("width vectors priced in") == 2
    assert (ROOT / "cost.json").read_bytes() == before


def test_fuzz_finds_nothing_in_a_few_networks(tmp_path):
    assert leave("fuzz", "--examples", "3", "--seed", "1", "--out", tmp_path / "fuzz.json") == 0
    assert rows_of(tmp_path / "fuzz.json") == []
    assert json.loads((tmp_path / "fuzz.json").read_text())["seed"] == 1


def test_greedy_shares_without_changing_a_loss(tmp_path):
    arguments = ("--model", "timm/test_resnet", "--size", "32", "--batch", "4", "--repeats", "1")
    assert leave("greedy", *arguments, "--out", tmp_path / "greedy.json") == 0
    (row,) = rows_of(tmp_path / "greedy.json")
    assert row["identical"]
    assert row["gain"] == pytest.approx(row["plain_s"] / row["shared_s"])
    assert row["bound"] >= row["attainable"] > 1


def test_strategies_keep_activations(tmp_path):
    arguments = ("--model", MODEL, "--size", "8", "--batch", "5", "--strategy", "bcv2")
    assert leave("strategy-memory", *arguments, "--out", tmp_path / "memory.json") == 0
    (row,) = rows_of(tmp_path / "memory.json")
    assert 0 < row["peak_bytes"] < row["one_backward_bytes"]


def test_a_searcher_runs_on_scores_at_hand():
    space = small_spaces()[1]
    budget = parse_budget("0.5x", space.graph)
    score = SyntheticScore(space, 0)
    searcher = SEARCHERS.build("random", {"n": 30}, space, budget, np.random.default_rng(0))
    judged = ask_and_tell(searcher, score.of, most=20)
    assert len(judged) == 20
    assert all(value == score.of(dict(zip(space.names, widths, strict=True))) for widths, value in judged.items())


def test_time_is_the_calls_own():
    found, seconds = timed(lambda: sum(range(200_000)))
    assert found == 19_999_900_000
    assert 0 < seconds.processor < 10
    assert 0 < seconds.clock < 60
