"""Work is counted where it is done: once per network and batch, however a searcher asks."""

import numpy as np
import pytest
import torch.nn.functional as F

from benchmarks.lazy import OPTIONS, PARTS, _Counting, _search, _summary
from widthkit.search.evaluator import Evaluator
from widthkit.supernet import make_supernet
from widthkit.testing import small_batch, small_graph, small_net


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_work_is_what_was_run(name, share, monkeypatch):
    net = make_supernet(small_net(), "ua", graph=small_graph(), k=4)
    judge = _Counting(net, [small_batch(seed) for seed in range(8)], F.cross_entropy, parts=PARTS, share=share)
    ran = []
    run = Evaluator._part

    def counted(self, batch, call):
        ran.append(batch[2])
        return run(self, batch, call)

    monkeypatch.setattr(Evaluator, "_part", counted)
    result = _search(net, judge, "0.5x", OPTIONS[name])
    assert result["work"]["examples"] == sum(ran)
    if name == "plain":
        greedy = plain(net, judge)
        assert result["widths"] == greedy[0]
        assert result["work"]["macs"] == greedy[1]


def plain(net, judge):
    """The plain loop, written out."""
    now, examples = dict(net.space.largest), sum(n for _, _, n in judge.batches)
    macs = net.graph.macs(now) * examples
    while net.graph.macs(now) > 0.5 * net.graph.macs():
        steps = [step for step in (net.space.narrower(now, name) for name in net.space.names) if step is not None]
        macs += sum(net.graph.macs(step) for step in steps) * examples
        now = max(steps, key=lambda step: Evaluator.__call__(judge, step).score)
    return now, macs


def test_the_summary_is_over_seeds():
    rows = [
        {
            "same": s,
            "groups_that_differ": 2 - s,
            "loss_above_plain": 0.1 * s,
            "work_gain": 2.0 + s,
            "process_seconds": 1.0,
        }
        for s in (0, 1, 1)
    ]
    found = _summary(rows)
    assert (found["same"], found["of"], found["work_gain"]) == (2, 3, 3.0)
    assert found["loss_above_plain"] == pytest.approx(0.2 / 3)
    assert found["standard_error"] == pytest.approx(np.std([0, 0.1, 0.1], ddof=1) / 3**0.5)
