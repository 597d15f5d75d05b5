"""A stranger's searcher may have networks trained on their own, and choose for itself."""

import itertools
import json
import math

import numpy as np
import pytest
import torch.nn.functional as F
from runs import Runs

from widthkit.budget import parse_budget
from widthkit.errors import OptionError, PluginError
from widthkit.search import Searcher, SearchResult, StandAlone, check_searcher, search
from widthkit.supernet import make_supernet
from widthkit.testing import small_batch, small_graph, small_net

LOADER = [small_batch(seed) for seed in range(2)]


class Mixed(Searcher):
    """Judges and trains in turns, one network both ways, and chooses the judged one that trained best."""

    def __init__(self, space, budget, rng, pick="best", declared=4):
        super().__init__(space, budget, rng)
        inside = [w for w in (space.sample(rng) for _ in range(100)) if budget.fits(space.graph, w)]
        distinct = list({json.dumps(w): w for w in inside}.values())
        self.rounds = [
            distinct[:2],
            StandAlone(distinct[:2]),
            [space.largest, *distinct[2:4]],
            StandAlone(distinct[1:4]),
        ]
        self.pick, self.declared, self.heard = pick, declared, []

    def ask(self):
        if self.done:
            return []
        asked = self.rounds[len(self.heard)]
        return type(asked)(dict(widths) for widths in asked)

    def tell(self, widths, scores):
        assert isinstance(widths, StandAlone) == isinstance(self.rounds[len(self.heard)], StandAlone)
        self.heard.append([(dict(w), s) for w, s in zip(widths, scores, strict=True)])

    @property
    def done(self):
        return len(self.heard) == len(self.rounds)

    @property
    def trainings(self):
        return self.declared

    def choice(self):
        trained = [pair for heard in self.heard[1::2] for pair in heard]
        picks = {
            "best": max(trained, key=lambda pair: pair[1])[0],
            "outside": self.space.largest,
            "never judged": {**self.space.smallest, self.space.names[0]: 3},
        }
        return picks.get(self.pick)

    def summary(self):
        return {"trained": [list(pair) for heard in self.heard[1::2] for pair in heard]}


@pytest.fixture(autouse=True)
def _stranger(add_searcher):
    add_searcher("mixed", Mixed)


def build():
    return make_supernet(small_net(), graph=small_graph(), k=4)


def accuracy(widths):
    return sum(math.log(w) * (i + 1) for i, w in enumerate(widths.values())) / 20


def quiet(net, budget="0.6x", **options):
    return search(net, LOADER, budget, "mixed", **{"loss": F.cross_entropy, "progress": False} | options)


def test_trainings_are_told_like_scores_and_are_no_trials():
    net = build()
    trained, seen, runs = [], [], Runs(net)
    result = quiet(
        net, train_fn=lambda w: trained.append(dict(w)) or accuracy(w), progress=lambda t, _: seen.append(t.widths)
    )
    asked = Mixed(net.space, parse_budget("0.6x", net.graph), np.random.default_rng(0)).rounds
    # The network that was trained twice is trained once.
    assert trained == [*asked[1], *asked[3][1:]]
    assert [t.widths for t in result.trials] == asked[0] + asked[2]
    assert sorted(map(repr, seen)) == sorted(map(repr, asked[0] + asked[2]))
    assert sorted(map(repr, runs.networks)) == sorted(map(repr, asked[0] + asked[2]))
    assert result.settings["trained"] == [[w, accuracy(w)] for w in asked[1] + asked[3]]
    assert all(t.score == -t.loss for t in result.trials)


def test_the_choice_of_the_searcher_is_the_result(tmp_path):
    """Also where another network scores better in the supernet; nothing is topped up then."""
    result = quiet(build(), train_fn=accuracy, out=tmp_path)
    trained = result.settings["trained"]
    assert result.widths == max(trained, key=lambda pair: pair[1])[0]
    assert result.score == next(t.score for t in result.trials if t.widths == result.widths)
    assert len(result.trials) == 5
    assert SearchResult.load(tmp_path / "search.json") == result


def test_without_a_choice_the_best_score_near_the_budget_is_the_result():
    net = build()
    result = quiet(net, train_fn=accuracy, pick=None)
    budget = parse_budget("0.6x", net.graph)
    near = [t for t in result.trials if 0.97 < budget.usage(net.graph, t.widths) <= 1]
    assert near
    assert result.widths == max(near, key=lambda t: t.score).widths


@pytest.mark.parametrize("pick", ["outside", "never judged"])
def test_a_choice_that_was_not_judged_inside_the_budget_is_refused(pick):
    with pytest.raises(PluginError, match="'mixed' chose widths that it had not judged inside the budget"):
        quiet(build(), train_fn=accuracy, pick=pick)


def test_nothing_is_judged_where_nobody_trains():
    net = build()
    runs = Runs(net)
    with pytest.raises(OptionError, match="'mixed' wants 4 networks trained on their own; pass train_fn"):
        quiet(net)
    budget = parse_budget("0.6x", net.graph)
    with pytest.raises(OptionError, match="pass train_fn"):
        check_searcher("mixed", net, budget, {})
    check_searcher("mixed", net, budget, {}, can_train=True)
    assert runs.widths == []


def test_a_searcher_that_does_not_say_that_it_wants_trainings_is_named():
    with pytest.raises(PluginError, match="Mixed asks for stand-alone trainings, but its 'trainings' is 0"):
        quiet(build(), declared=0)


def test_trainings_have_journal_lines_of_their_own(tmp_path):
    quiet(build(), train_fn=accuracy, out=tmp_path)
    lines = [json.loads(line)["widths"] for line in (tmp_path / "search-journal.jsonl").read_text().splitlines()[1:]]
    assert [line.startswith("stand-alone {") for line in lines] == [False] * 2 + [True] * 2 + [False] * 3 + [True] * 2
    # Two networks were judged and trained.
    assert set(lines[:2]) == {line.removeprefix("stand-alone ") for line in lines[2:4]}


@pytest.mark.parametrize("stop", range(9))
def test_an_interrupted_search_repeats_neither_judgements_nor_trainings(stop, tmp_path):
    """At every point: two judged, two trained, three judged, two trained."""
    steps = itertools.count()

    def count(*_):
        if next(steps) == stop:
            raise KeyboardInterrupt

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = quiet(build(), train_fn=accuracy, out=whole)
    trained, net = [], build()
    runs = Runs(net)

    def train(widths):
        count()
        trained.append(json.dumps(widths))
        return accuracy(widths)

    with pytest.raises(KeyboardInterrupt):
        quiet(net, train_fn=train, out=cut, progress=count)
    result = quiet(net, train_fn=train, out=cut, resume=True)
    assert result == expected
    for name in ("search.json", "search-journal.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert len(runs.networks) == 5
    assert len(trained) == len(set(trained)) == 4


def test_a_training_that_diverges_counts_as_worst_and_is_kept(tmp_path):
    trained = []

    def train(widths):
        trained.append(dict(widths))
        return math.nan if len(trained) == 1 else accuracy(widths)

    result = quiet(build(), train_fn=train, out=tmp_path)
    assert result.settings["trained"][0] == [trained[0], -math.inf]
    assert result.widths != trained[0]
    quiet(build(), train_fn=train, out=tmp_path, resume=True)
    assert len(trained) == 4


def test_what_trains_may_do_what_it_likes_with_its_argument():
    def train(widths):
        found = accuracy(widths)
        widths.clear()
        return found

    assert quiet(build(), train_fn=train).settings == quiet(build(), train_fn=accuracy).settings
