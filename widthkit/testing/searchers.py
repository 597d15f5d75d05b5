"""What every searcher must hold to."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch

from widthkit.budget import Budget, parse_budget
from widthkit.graph.space import SearchSpace
from widthkit.search.searcher import Searcher, StandAlone
from widthkit.testing.examples import SPACES, build_space, small_graph

MakeSearcher = Callable[[SearchSpace, Budget, np.random.Generator], Searcher]
Score = Callable[[Mapping[str, int]], float]
Round = tuple[list[dict[str, int]], list[float]]

_ROUNDS = 20_000
"""A searcher that is not done after this many rounds on a tiny space is taken to be stuck."""
_BUDGETS = ("0.5x", "0.3x", "1x", "0.6x,0.7kparams")


def smooth_score(widths: Mapping[str, int]) -> float:
    """Score wider networks higher, some groups more than others, without ties."""
    return sum(math.sqrt((g + 2) * width) for g, width in enumerate(widths.values()))


def play(searcher: Searcher, score: Score, rounds: int | None = None) -> list[Round]:
    """Run a searcher to its end, or for some rounds; return what was asked and told."""
    played: list[Round] = []
    while not searcher.done and (rounds is None or len(played) < rounds):
        assert len(played) < _ROUNDS, f"{type(searcher).__name__} is not done after {_ROUNDS} rounds"
        asked = searcher.ask()
        if not asked:
            break
        scores = [score(widths) for widths in asked]
        played.append((copy.deepcopy(asked), scores))
        searcher.tell(asked, scores)
    return played


class SearcherConformance:
    """Subclass this, name the class ``Test...``, and give it a fixture ``make_searcher``.

    The fixture returns a callable ``(space, budget, rng) -> Searcher``; a class whose options all have defaults is
    one already. Keep the searcher short (some hundred width vectors), for it is run many times.

    >>> class TestDefault(SearcherConformance):
    ...     @pytest.fixture
    ...     def make_searcher(self):
    ...         return SEARCHERS.get(SEARCHERS.default)
    """

    @pytest.fixture
    def make_searcher(self) -> MakeSearcher:
        """Return a callable that builds the searcher under test; every subclass overrides this."""
        raise NotImplementedError(f"{type(self).__name__} needs a fixture 'make_searcher'")

    def _build(self, make: MakeSearcher, space: str = "plain", budget: str = "0.5x", seed: int = 0) -> Searcher:
        graph = small_graph()
        return make(build_space(space, graph), parse_budget(budget, graph), np.random.default_rng(seed))

    # --- what it proposes ---------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("space", SPACES)
    def test_proposals_name_every_group_with_a_width_in_range(self, make_searcher: MakeSearcher, space: str) -> None:
        """On every kind of space; widths are ints, for they are written to files."""
        searcher = self._build(make_searcher, space, "10x")
        ranges = {g.name: (g.narrowest, g.widest) for g in searcher.space.groups}
        for asked, _ in play(searcher, smooth_score):
            for widths in asked:
                assert list(widths) == list(ranges), "name every group, in the space's order"
                json.dumps(widths)
                for name, width in widths.items():
                    assert ranges[name][0] <= width <= ranges[name][1]

    @pytest.mark.parametrize("budget", _BUDGETS)
    @pytest.mark.parametrize("space", ["plain", "shrink and grow", "bins"])
    def test_something_inside_the_budget_is_proposed(
        self, make_searcher: MakeSearcher, space: str, budget: str
    ) -> None:
        """Where the space has such a point, the result holds every bound."""
        searcher = self._build(make_searcher, space, budget)
        searcher.budget.check(searcher.space)
        asked = [widths for round_, _ in play(searcher, smooth_score) for widths in round_]
        assert any(searcher.budget.fits(searcher.space.graph, widths) for widths in asked)

    def test_its_choice_was_judged(self, make_searcher: MakeSearcher) -> None:
        """A searcher may choose for itself, among networks that were judged inside the supernet and fit the budget."""
        searcher = self._build(make_searcher)
        judged = [w for asked, _ in play(searcher, smooth_score) for w in asked if not isinstance(asked, StandAlone)]
        choice = searcher.choice()
        assert choice is None or (choice in judged and searcher.budget.fits(searcher.space.graph, choice))
        json.dumps(searcher.summary())

    def test_a_space_of_one_point_is_searched(self, make_searcher: MakeSearcher) -> None:
        """Its only point is proposed, and that is all."""
        searcher = self._build(make_searcher, "single choice", "1x")
        asked = [widths for round_, _ in play(searcher, smooth_score) for widths in round_]
        assert asked
        assert all(widths == searcher.space.largest for widths in asked)

    # --- how it ends --------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("budget", ["0.5x", "10x"])
    def test_it_ends_and_stays_ended(self, make_searcher: MakeSearcher, budget: str) -> None:
        """Once done, nothing is asked; progress stays between 0 and 1 on the way."""
        searcher = self._build(make_searcher, budget=budget)
        assert not searcher.done
        while not searcher.done:
            assert 0 <= searcher.progress <= 1
            asked = searcher.ask()
            if not asked:
                break
            searcher.tell(asked, [smooth_score(widths) for widths in asked])
        assert 0 <= searcher.progress <= 1
        assert searcher.ask() == []

    @pytest.mark.parametrize("bad", [math.nan, -math.inf])
    @pytest.mark.parametrize("every", [1, 2, 3])
    def test_networks_that_diverge_do_not_stop_it(self, make_searcher: MakeSearcher, bad: float, every: int) -> None:
        """A score that is NaN or minus infinity counts as worst."""
        searcher = self._build(make_searcher)
        calls = iter(range(10**9))
        played = play(searcher, lambda widths: smooth_score(widths) if next(calls) % every else bad)
        assert any(searcher.budget.fits(searcher.space.graph, widths) for asked, _ in played for widths in asked)

    # --- repeatability ------------------------------------------------------------------------------------------------

    def test_the_seed_determines_the_search(self, make_searcher: MakeSearcher) -> None:
        """Two searchers with equal generators ask the same; nothing else is drawn from."""
        states = torch.get_rng_state(), str(np.random.get_state())
        first, second = (play(self._build(make_searcher, seed=5), smooth_score) for _ in range(2))
        assert first == second
        assert torch.equal(torch.get_rng_state(), states[0]), "draw from the generator that the searcher is given"
        assert str(np.random.get_state()) == states[1], "draw from the generator that the searcher is given"

    def test_told_scores_again_it_goes_on_identically(self, make_searcher: MakeSearcher) -> None:
        """A resumed search tells a fresh searcher what is known; from any point it then asks the same."""
        whole = play(self._build(make_searcher), smooth_score)
        for cut in _cuts(len(whole)):
            again = self._build(make_searcher)
            for asked, scores in whole[:cut]:
                assert again.ask() == asked
                again.tell(asked, scores)
            assert whole[:cut] + play(again, smooth_score) == whole

    def test_proposals_belong_to_the_caller(self, make_searcher: MakeSearcher) -> None:
        """Changing what was asked and told leaves the search as it is."""
        expected = play(self._build(make_searcher), smooth_score)
        searcher = self._build(make_searcher)
        for asked, scores in expected:
            proposal = searcher.ask()
            assert proposal == asked
            searcher.tell(proposal, scores)
            for widths in proposal:
                widths.clear()
        assert searcher.done or searcher.ask() == []


def _cuts(n: int) -> Sequence[int]:
    return sorted({0, 1, n // 3, n // 2, n - 1, n})
