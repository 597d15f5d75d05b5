"""``widthkit bench step``, ``trace`` and ``formats`` on a small model: files with versions, device and rows."""

import json
import re
from functools import partial

import pytest
from command import here
from torch import nn


def small_cnn(num_classes=3):
    layers = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


MODEL = f"{__name__}:small_cnn"


@pytest.fixture
def bench(capfd, monkeypatch, tmp_path):
    run = partial(here, capfd, monkeypatch, "bench")

    def rows(name, *options):
        out = tmp_path / "result.json"
        done = run(name, "--model", MODEL, *options, "--out", out)
        assert done.returncode == 0, done.stderr
        record = json.loads(out.read_text())
        assert record["benchmark"] == name
        assert record["machine"]["device"] == "cpu"
        assert "torch" in record["versions"]
        return record["rows"]

    return rows


def test_step(bench):
    rows = bench("step", "--size", "8", "--size", "12", "--batch", "4", "--repeats", "3")
    assert [row["size"] for row in rows] == [8, 12]
    assert all(row["ratio"] > 0 and row["naive_ratio"] > 0 and row["dense_ms"] > 0 for row in rows)


def test_trace(bench):
    (row,) = bench("trace", "--repeats", "1")
    assert (row["groups"], row["units"], row["searchable_macs_share"]) == (2, 20, 1.0)
    assert row["seconds"] > 0


def test_formats(bench):
    rows = bench("formats", "--format", "safetensors", "--format", "pt2", "--size", "8")
    assert [row["format"] for row in rows] == ["safetensors", "pt2"]
    assert all(row["relative"] <= row["allowed"] and row["bytes"] > 0 for row in rows)


def test_commands_that_moved_are_not_here(capfd, monkeypatch):
    done = here(capfd, monkeypatch, "bench", "--help")
    assert all(re.search(rf"^\W*{name} ", done.stdout, re.M) for name in ("step", "trace", "latency", "formats"))
    assert not any(
        re.search(rf"^\W*{name} ", done.stdout, re.M) for name in ("zoo", "fuzz", "greedy", "cost", "lazy", "learn")
    )
