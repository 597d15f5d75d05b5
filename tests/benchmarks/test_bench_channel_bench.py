"""Score models on Channel-Bench-Macro: the figures on real data."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kendalltau

from benchmarks import channel_bench
from benchmarks.score_model import Benchmark, denoised
from widthkit.errors import DataError
from widthkit.graph.space import uniform_space
from widthkit.trace import trace

DATA = Path(os.environ.get("WIDTHKIT_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.mark.parametrize(("name", "narrow"), [("MobileNet", 14_285_312), ("ResNet", None)])
def test_the_networks_of_channel_bench_have_their_widths(name, narrow):
    """The README's table of maximal widths, and the smallest network's multiply-adds by hand."""
    widest = {"MobileNet": [128, 768, 768, 768, 256, 1536, 1024], "ResNet": [256, 256, 256, 512, 512, 512, 512]}
    space = uniform_space(trace(channel_bench.NETWORKS[name](), (1, 3, 32, 32)), 4)
    assert [g.widest for g in space.groups] == widest[name]
    assert all(g.options == tuple(g.widest * i // 4 for i in (1, 2, 3, 4)) for g in space.groups)
    if narrow:
        assert space.graph.macs(space.smallest) == narrow


def test_damaged_tables_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        channel_bench.load(tmp_path)
    with pytest.raises(DataError, match="unknown space"):
        channel_bench.load(tmp_path, "VGG")
    file = tmp_path / "Results_MobileNet.json"
    for table in ({}, {"1111111": {"acc": [1, 2, 3], "flops": 1}}, {"1111111": {}}, {"111": {"acc": [], "flops": 1}}):
        file.write_text(json.dumps(table))
        with pytest.raises(DataError):
            channel_bench.load(tmp_path)


def data():
    folder = DATA / "channel-bench-macro"
    if not (folder / "Results_MobileNet.json").exists():
        pytest.skip(f"Channel-Bench-Macro is not in {folder}; WIDTHKIT_DATA names the folder of data sets")
    return folder


@pytest.mark.data
def test_smoothed_scores_rank_real_networks_better_than_raw_ones():
    folder = data()
    bench = channel_bench.load(folder)
    table = Benchmark(bench, seeds=1)
    for name, bar in (("autoslim_3", 0.77), ("bcnet_3", 0.70)):
        values = bench.scores(folder / f"published_scores_{name}.json")
        everything = int(np.isfinite(values).sum())
        raw = table.row(name, values, everything, "none", "raw scores")
        assert raw.tau == pytest.approx(kendalltau(values, table.truth, nan_policy="omit").statistic, abs=1e-3)
        assert table.row(name, values, everything, "none", "log-linear").tau >= bar > raw.tau


@pytest.mark.data
def test_the_denoised_truth_loses_nothing_but_noise():
    bench = channel_bench.load(data())
    noise = np.sqrt(bench.accuracy.var(1, ddof=1).mean() / 3)
    assert (bench.accuracy.mean(1) - denoised(bench)).std() < 1.05 * noise
