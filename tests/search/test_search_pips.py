"""Prior initial population sampling: exact expectations, optimal distributions, better populations."""

import itertools
import json

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from widthkit_plugins.searchers.evolution.pips import potential_errors, prior_population
from widthkit_plugins.searchers.evolution.pips_program import Bounds, fit
from widthkit_plugins.searchers.evolution.searcher import EvolutionSearcher

import widthkit as wk
from benchmarks.search import SyntheticScore, gaps, small_spaces
from widthkit.budget import Budget, Limit, parse_budget
from widthkit.errors import OptionError
from widthkit.graph.expectation import Expectation, moments
from widthkit.graph.space import uniform_space
from widthkit.search import search
from widthkit.search.resources import Resources, make_searcher
from widthkit.supernet import make_supernet
from widthkit.testing import small_batch, small_graph, small_net
from widthkit.trace import trace


class Concat(nn.Module):
    """Concatenation, a residual trunk that meets itself, and a flattened layer: affine forms of several groups."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1)
        self.c = nn.Conv2d(9, 6, 3, padding=1)
        self.d = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6 * 16, 3)

    def forward(self, x):
        c = self.c(torch.cat([self.a(x), self.b(x)], 1))
        return self.head((c + self.d(c)).flatten(1))


def spaces():
    return {
        "small": uniform_space(small_graph(), 4),
        "concat": uniform_space(trace(Concat(), (1, 3, 4, 4)), 3),
    }


def random_distributions(space, seed):
    rng = np.random.default_rng(seed)
    return [rng.dirichlet(np.ones(len(g.options))) for g in space.groups]


def enumerated(space, distributions, cost):
    """The expectation by definition: every point's cost times its probability."""
    total = 0.0
    for genes in itertools.product(*(range(len(g.options)) for g in space.groups)):
        probability = np.prod([p[i] for p, i in zip(distributions, genes, strict=True)])
        total += probability * cost(space.decode(genes))
    return total


@pytest.mark.parametrize("name", ["small", "concat"])
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_the_expectation_is_that_of_enumeration(name, kind):
    space = spaces()[name]
    graph = space.graph
    expectation = Expectation.of(getattr(graph.cost, f"{kind}_polynomial"))
    if name == "concat":
        assert expectation.degree == 2  # a group that meets itself: the product of means would be wrong
    for seed in range(3):
        distributions = random_distributions(space, seed)
        options = [np.array(g.options) for g in space.groups]
        exact = expectation.value(moments(options, distributions, expectation.degree))
        assert exact == pytest.approx(enumerated(space, distributions, getattr(graph, kind)), rel=1e-12)


def test_the_slopes_are_finite_differences():
    space = spaces()["concat"]
    bounds = Bounds.of(space, parse_budget("0.5x,200params", space.graph))
    distributions = random_distributions(space, 0)
    flat, ends = np.concatenate(distributions), np.cumsum([len(p) for p in distributions])[:-1]
    slopes = bounds.slopes(distributions)
    for i in range(len(flat)):
        moved = flat.copy()
        moved[i] += 1e-6
        difference = (bounds.usage(np.split(moved, ends)) - bounds.usage(distributions)) / 1e-6
        assert difference == pytest.approx(slopes[:, i], rel=1e-5)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_potential_errors_are_equation_13():
    space = uniform_space(small_graph(), 4)
    rng = np.random.default_rng(0)
    history = [(space.sample(rng), float(rng.uniform(1, 2))) for _ in range(30)]
    history = [(w, loss) for w, loss in history if w["top.0"] != 3]
    best = sorted(history, key=lambda r: r[1])[:20]
    errors = potential_errors(space, history, "mean", keep=20)
    for g, error in zip(space.groups, errors, strict=True):
        for option, value in zip(g.options, error, strict=True):
            users = [loss for widths, loss in best if widths[g.name] == option]
            assert value == pytest.approx(np.mean(users) if users else max(loss for _, loss in best))
    assert errors[2][space.groups[2].options.index(3)] == best[-1][1]  # never seen: the worst


def test_widths_between_choices_count_for_the_nearest_and_outside_for_none():
    space = uniform_space(small_graph(), 2, fixed={"expand.0": 12, "top.0": 6})  # stem.0: 4 or 8
    at = {"expand.0": 12, "top.0": 6}
    history = [({"stem.0": 7, **at}, 1.0), ({"stem.0": 5, **at}, 2.0), ({"stem.0": 1, **at}, 0.5)]
    assert potential_errors(space, history, "mean")[0].tolist() == [2.0, 1.0]


def test_benefit_prefers_what_the_best_use_often_and_never_punishes_width():
    space = uniform_space(small_graph(), 4)
    rng = np.random.default_rng(0)
    errors = potential_errors(space, [(space.sample(rng), float(rng.uniform(1, 2))) for _ in range(100)])
    assert all((np.diff(error) <= 1e-12).all() for error in errors)
    often = [({"stem.0": 6, "expand.0": 12, "top.0": 6}, 1.0 + i / 100) for i in range(9)]
    often.append(({"stem.0": 2, "expand.0": 12, "top.0": 6}, 1.0))
    two, four, six, _ = potential_errors(space, often)[0]
    assert six < four < two


@pytest.mark.parametrize("history", [[], [({"other": 3}, 1.0)]])
def test_histories_that_say_nothing_are_refused(history):
    with pytest.raises(OptionError):
        potential_errors(uniform_space(small_graph(), 4), history)


# --- distributions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("text", ["0.3x", "0.5x", "0.6x,350params"])
def test_distributions_are_as_good_as_a_general_solver_finds(seed, text):
    """SLSQP on the true, nonconvex problem, from several starts; the result here must not be worse."""
    space = uniform_space(small_graph(), 4)
    budget = parse_budget(text, space.graph)
    rng = np.random.default_rng(seed)
    errors = [rng.uniform(0, 1, len(g.options)) for g in space.groups]
    scale = np.mean([e.max() - e.min() for e in errors])
    bounds = Bounds.of(space, budget)
    ends = np.cumsum([len(e) for e in errors])[:-1]

    def objective(distributions):
        pairs = zip(distributions, errors, strict=True)
        return sum((p * (e - e.min())).sum() / scale + 0.1 * (p * np.log(np.maximum(p, 1e-12))).sum() for p, e in pairs)

    def softmax(z):
        parts = [np.exp(part - part.max()) for part in np.split(z, ends)]
        return [part / part.sum() for part in parts]

    found = fit(space, budget, errors, 0.1)
    assert (bounds.usage(found) <= 1 + 1e-9).all()
    assert all(p.sum() == pytest.approx(1) and (p >= 0).all() for p in found)
    others = []
    for start in range(5):
        constraint = {"type": "ineq", "fun": lambda z: 1 - bounds.usage(softmax(z))}
        z = np.random.default_rng(start).normal(0, 2, len(np.concatenate(errors)))
        solved = minimize(lambda z: objective(softmax(z)), z, method="SLSQP", constraints=[constraint])
        if (bounds.usage(softmax(solved.x)) <= 1 + 1e-6).all():
            others.append(solved.fun)
    assert others
    assert objective(found) <= min(others) + 2e-3


def test_entropy_spreads_the_distributions():
    """A linear objective under one constraint has an optimum with all groups but few at a single choice."""
    space = small_spaces()[0]
    budget = parse_budget("0.5x", space.graph)
    errors = [np.random.default_rng(g).uniform(0, 1, len(group.options)) for g, group in enumerate(space.groups)]

    def entropy(distributions):
        return sum(-(p * np.log(np.maximum(p, 1e-300))).sum() for p in distributions)

    spread = [entropy(fit(space, budget, errors, weight)) for weight in (0.0, 0.01, 0.1, 1.0)]
    assert spread == sorted(spread)
    assert spread[0] < np.log(2) + 1e-3  # at most one group is split between two choices
    assert spread[2] > 2


@pytest.mark.parametrize("text", ["0.3x", "0.5x", "0.5x,3kparams"])
def test_populations_are_distinct_inside_and_better_than_random(text):
    """The mean score of the first population, over six scores; random and prior under the same budget."""
    gains = []
    for seed in range(6):
        space = small_spaces()[seed % 2]
        budget = parse_budget(text, space.graph)
        score = SyntheticScore(space, seed)
        history = score.history(500, seed)
        means = {}
        for kind, given in (("random", ()), ("prior", history)):
            asked = EvolutionSearcher(space, budget, np.random.default_rng(seed), history=given).ask()
            assert len({tuple(w.values()) for w in asked}) == len(asked) == 40
            assert all(budget.fits(space.graph, w) for w in asked)
            scores = score(np.array([list(w.values()) for w in asked]))
            means[kind] = scores.mean(), scores.std()
        gains.append((means["prior"][0] - means["random"][0]) / means["random"][1])
    # In standard deviations of the random population's scores; 0 would be no better than random.
    assert np.mean(gains) > 0.3
    assert min(gains) > 0


def test_a_budget_without_polynomials_is_held_all_the_same():
    class Time(Budget):
        """A made-up latency that is no polynomial: the slowest group decides."""

        def costs(self, graph, widths):
            vectors = graph.vector(widths)
            return (vectors / graph.group_widths).max(axis=-1)[..., None] / self.limits[0].value

        def fits(self, graph, widths):
            return bool(self.costs(graph, widths).max() <= 1)

    space = small_spaces()[1]
    budget = Time((Limit("ms", 0.7, "0.7ms"),))
    history = SyntheticScore(space, 0).history(300, 0)
    asked = prior_population(space, budget, history, np.random.default_rng(0), 20, entropy=0.1, near_budget=0.5)
    assert len(asked) == 20
    assert all(budget.fits(space.graph, w) for w in asked)


# --- the searcher -----------------------------------------------------------------------------------------------------


def trained(strategy="bc"):
    net = make_supernet(small_net(), strategy, graph=small_graph(), k=4)
    wk.train(net, [small_batch(i) for i in range(20)], 2, lr=0.01, device="cpu", progress=False)
    return net


def test_the_search_hands_the_history_to_searchers_that_want_it():
    net = trained()
    budget = parse_budget("0.5x", net.graph)
    first = {}
    for pips in (True, False):
        engine = make_searcher(
            "evolution", Resources(net), budget, np.random.default_rng(0), {"population": 8, "pips": pips}
        )
        first[pips] = engine.ask()
    assert first[True] != first[False]
    greedy = make_searcher("greedy", Resources(net), budget, np.random.default_rng(0), {})
    assert not hasattr(greedy, "history")
    loader = [small_batch(0)]
    result = search(net, loader, budget, "evolution", population=4, generations=2, progress=False)
    assert result.settings["history"] == len(net.width_history.records) > 0


def test_nothing_is_asked_twice_in_one_search():
    space = small_spaces()[0]
    budget = parse_budget("0.5x", space.graph)
    score = SyntheticScore(space, 0)
    engine = EvolutionSearcher(space, budget, np.random.default_rng(0), population=10, generations=20)
    asked = []
    while not engine.done:
        now = engine.ask()
        asked += [tuple(w.values()) for w in now]
        engine.tell(now, score(np.array([list(w.values()) for w in now])).tolist())
    assert len(asked) == len(set(asked)) > 180


@pytest.mark.parametrize("options", [{"entropy": 0}, {"entropy": -1}, {"estimate": "best"}])
def test_options_that_make_no_sense(options):
    space = small_spaces()[0]
    history = SyntheticScore(space, 0).history(50, 0)
    with pytest.raises(OptionError):
        EvolutionSearcher(
            space, parse_budget("0.5x", space.graph), np.random.default_rng(0), history=history, **options
        )


def test_searchers_against_brute_force():
    """Gap 0 is the best network near the budget, 1 the mean one inside; at most 120 of 4,096 networks are judged."""
    space = small_spaces()[0]
    rows = {
        row["searcher"]: row
        for row in gaps(space, parse_budget("0.5x", space.graph), ["evolution", "greedy", "random"], 5, 120)
    }
    json.dumps(rows)
    assert rows["evolution"]["mean_gap"] < 0.03
    assert rows["greedy"]["mean_gap"] < 0.06
    assert rows["random"]["mean_gap"] < 0.15
    assert all(-1e-12 <= row["mean_gap"] <= row["worst_gap"] for row in rows.values())
    assert all(row["least_usage"] > 0.97 for row in rows.values())


def test_errors_come_from_the_m_best_records_only():
    """Eq. 13 with m = 2: the third record is not counted."""
    space = uniform_space(small_graph(), 2)
    full, half = space.largest, space.smallest
    history = [(full, 1.0), (half, 2.0), ({**full, space.names[0]: half[space.names[0]]}, 9.0)]
    two, three = (potential_errors(space, history, "mean", keep) for keep in (2, 3))
    assert [error.tolist() for error in two] == [[2.0, 1.0]] * 3
    assert [error.tolist() for error in three] == [[5.5, 1.0], [2.0, 5.0], [2.0, 5.0]]
    budget = parse_budget("0.9x", small_graph())
    with pytest.raises(OptionError, match="keep=0"):
        EvolutionSearcher(space, budget, np.random.default_rng(0), keep=0)
