"""The table of score models, on a space whose truth is known because it is made here."""

import numpy as np
import pytest
from scipy.stats import kendalltau

from benchmarks.channel_bench import ChannelBench
from benchmarks.score_model import Benchmark, denoised
from benchmarks.search import every_point, small_spaces


@pytest.fixture(scope="module")
def bench():
    space = small_spaces()[1]
    widths = every_point(space)
    log = np.log(widths / widths.max(0))
    truth = 90 + log @ np.linspace(1, 3, log.shape[1]) - (log**2).sum(1)
    noise = np.random.default_rng(0).normal(0, 0.05, (len(truth), 3))
    keys = tuple(str(i) for i in range(len(truth)))
    return ChannelBench("made", space, keys, widths, truth[:, None] + noise, space.graph.macs(widths))


@pytest.fixture(scope="module")
def scores(bench):
    return bench.accuracy.mean(1) + np.random.default_rng(1).normal(0, 4.0, len(bench.keys))


def test_tau_of_raw_scores_is_that_of_scipy(bench, scores):
    row = Benchmark(bench, seeds=1).row("made", scores, len(scores), "none", "raw scores")
    assert row.tau == pytest.approx(kendalltau(scores, bench.accuracy.mean(1)).statistic)
    assert row.tau_std == 0


def test_smoothing_beats_the_raw_scores_and_denoising_finds_the_truth(bench, scores):
    table = Benchmark(bench, seeds=2)
    raw = table.row("made", scores, len(scores), "none", "raw scores")
    smooth = table.row("made", scores, 256, "none", "log-linear")
    assert smooth.evaluations == 256
    assert smooth.tau > raw.tau + 0.1
    assert smooth.expected_regret <= raw.expected_regret
    residual = bench.accuracy.mean(1) - denoised(bench)
    assert residual.std() < 0.05


def test_a_guided_search_picks_a_network_inside_the_budget(bench, scores):
    table = Benchmark(bench, seeds=2)
    row = table.guided("made", scores, 64, "log-linear")
    assert row.evaluations == 64
    assert row.tau > table.row("made", scores, len(scores), "none", "raw scores").tau
    inside = bench.accuracy.mean(1)[table.inside]
    assert 0 <= row.regret < inside.max() - np.median(inside)
