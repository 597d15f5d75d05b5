"""The conformance suites themselves: a plug-in that breaks a rule fails the test of that rule."""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from widthkit_plugins.searchers.greedy import GreedySearcher
from widthkit_plugins.searchers.random_search import RandomSearcher
from widthkit_plugins.strategies.bc import BilaterallyCoupled
from widthkit_plugins.strategies.ua import UniversallyAligned

from widthkit.errors import OptionError, PluginError
from widthkit.supernet import make_supernet
from widthkit.supernet.strategy import StepCost, Strategy
from widthkit.testing import SearcherConformance, StrategyConformance
from widthkit.testing.examples import small_graph, small_net


def derived(base, **methods):
    """A strategy like ``base`` with some methods replaced; a frozen dataclass as it should be."""
    return dataclass(frozen=True)(type("Broken", (base,), {"__doc__": "Broken on purpose.", **methods}))()


def untouched(self, net, step):
    return torch.zeros(())


def same_widths(self, net, step):
    loss = step.loss(net.forward_on(net.paths(net.space.smallest)[0], step), step.targets)
    step.backward(loss)
    return loss.detach()


def updates(self, net, step):
    loss = UniversallyAligned.train_step(self, net, step)
    with torch.no_grad():
        net.model.head.weight.add_(1)
    return loss


def global_draws(self, net, step):
    torch.rand(1)
    return UniversallyAligned.train_step(self, net, step)


def attached(self, net, step):
    loss = step.loss(net.forward_on(net.paths(net.space.largest)[0], step), step.targets)
    step.backward(loss)
    return loss


def counting(self, net, step):
    """Keeps a number that no checkpoint knows."""
    COUNTS[id(net)] = COUNTS.get(id(net), 0) + 1
    widths = net.space.largest if COUNTS[id(net)] > 2 else net.space.smallest
    loss = step.loss(net.forward_on(net.paths(widths)[0], step), step.targets)
    step.backward(loss)
    return loss.detach()


def moody(self, net, widths):
    """Picks other units at every call."""
    rng = np.random.default_rng()
    return [{n: np.sort(rng.permutation(net.wide_graph.full[n])[: max(1, w // 2)]) for n, w in widths.items()}]


def records_a_share(self, net, step):
    loss = UniversallyAligned.train_step(self, net, step)
    net.record(net.space.largest, loss / 2)
    return loss


def ignores_the_teacher(self, net, step):
    loss = step.loss(net.forward_on(net.paths(net.space.largest)[0], step), step.targets)
    step.backward(loss)
    return loss.detach()


def records_the_teacher(self, net, step):
    outputs = net.forward_on(net.paths(net.space.largest)[0], step)
    loss = step.with_teacher(outputs, step.loss(outputs, step.targets))
    step.backward(loss)
    net.record(net.space.largest, loss)
    return loss.detach()


def records_too_wide(self, net, step):
    loss = UniversallyAligned.train_step(self, net, step)
    net.record({name: width + 1 for name, width in net.space.largest.items()}, loss)
    return loss


def last_units(self, net):
    return {g.name: np.arange(g.widest // 2, g.widest) for g in net.space.groups}


COUNTS = {}
TMP = Path(tempfile.mkdtemp())

STRATEGIES = {
    "capacity": ("test_capacity_covers_the_widest_choice", {"capacity": lambda s, c: c.widest - 1}, ("plain",)),
    "past the end": (
        "test_paths_name_distinct_ascending_units_inside_the_capacity",
        {"paths": lambda s, width, c: (np.arange(width) + 1,)},
        ("plain",),
    ),
    "descending": (
        "test_paths_name_distinct_ascending_units_inside_the_capacity",
        {"paths": lambda s, width, c: (np.arange(width)[::-1],)},
        ("plain",),
    ),
    "random paths": (
        "test_paths_are_deterministic",
        {"paths": lambda s, w, c: (np.sort(np.random.default_rng().permutation(c.widest)[:w]),)},
        (),
    ),
    "too few": (
        "test_paths_name_distinct_ascending_units_inside_the_capacity",
        {"paths": lambda s, width, c: (np.arange(max(1, width - 1)),)},
        ("plain",),
    ),
    "cost": ("test_a_step_costs_what_it_declares", {"cost": property(lambda s: StepCost(1, 1))}, ()),
    "untrained": ("test_every_unit_is_trained", {"train_step": same_widths}, ("plain",)),
    "no gradients": ("test_a_step_gives_a_finite_detached_loss_and_gradients", {"train_step": untouched}, ("plain",)),
    "attached": ("test_a_step_gives_a_finite_detached_loss_and_gradients", {"train_step": attached}, ("plain",)),
    "learns nothing": ("test_training_learns", {"train_step": untouched}, ()),
    "updates": ("test_a_step_leaves_weights_to_the_optimiser", {"train_step": updates}, ()),
    "global draws": ("test_a_step_leaves_weights_to_the_optimiser", {"train_step": global_draws}, ()),
    "records a share": ("test_records_are_losses_of_trained_widths", {"train_step": records_a_share}, ()),
    "records too wide": ("test_records_are_losses_of_trained_widths", {"train_step": records_too_wide}, ()),
    "ignores the teacher": ("test_a_step_learns_from_a_teacher", {"train_step": ignores_the_teacher}, ()),
    "records the teacher": ("test_a_step_learns_from_a_teacher", {"train_step": records_the_teacher}, ()),
    "NaN wins": (
        "test_scores_that_are_no_numbers_never_win",
        {"combine": lambda s, scores: np.nan_to_num(scores[0])},
        (),
    ),
    "hidden state": ("test_training_can_be_stored_and_continued", {"train_step": counting}, ("plain", TMP)),
    "moody": ("test_every_width_of_every_group_is_judged", {"subnetworks": moody}, ("single choice",)),
    "lost choice": ("test_hooks_have_the_agreed_forms", {"chosen": last_units}, ()),
    "sum": ("test_scores_of_all_paths_become_one", {"combine": lambda s, scores: sum(scores) + 1}, ()),
}


@pytest.mark.parametrize(("test", "methods", "arguments"), STRATEGIES.values(), ids=STRATEGIES)
def test_a_broken_strategy_fails(test, methods, arguments):
    suite = StrategyConformance()
    getattr(suite, test)(derived(UniversallyAligned), *arguments)
    with pytest.raises(Exception, match=r".") as caught:
        getattr(suite, test)(derived(UniversallyAligned, **methods), *arguments)
    assert not isinstance(caught.value, (AttributeError, NameError, TypeError))


def test_a_strategy_that_is_no_frozen_dataclass_fails():
    class Loose(BilaterallyCoupled):
        """Not a dataclass of its own, which is fine."""

    StrategyConformance().test_strategy_is_a_frozen_dataclass(Loose())

    class Bare(Strategy):
        capacity = paths = train_step = combine = cost = None

    with pytest.raises(AssertionError, match="decorate the class"):
        StrategyConformance().test_strategy_is_a_frozen_dataclass(Bare())


class Second(GreedySearcher):
    """From the second one made, candidates come in another order."""

    made = 0

    def __init__(self, *given):
        super().__init__(*given)
        Second.made += 1
        self.turns = Second.made > 1

    def ask(self):
        return super().ask()[::-1] if self.turns else super().ask()


class Elsewhere(GreedySearcher):
    def choice(self):
        return {**self.space.smallest, self.space.names[0]: self.space.groups[0].widest}


class ChoosesTheWidest(GreedySearcher):
    """Judged, but outside the budget."""

    def choice(self):
        return self.space.largest


class Unseeded(RandomSearcher):
    def __init__(self, space, budget, rng):
        super().__init__(space, budget, np.random.default_rng(), n=10, near_budget=0.0)


class Endless(GreedySearcher):
    done = property(lambda self: False)

    def ask(self):
        return [self.space.largest]

    def tell(self, widths, scores):
        pass


class Wide(GreedySearcher):
    def ask(self):
        return [{**w, self.space.names[0]: self.space.groups[0].widest + 1} for w in super().ask()]

    def tell(self, widths, scores):
        super().tell([{**w, self.space.names[0]: self.space.groups[0].narrowest} for w in widths], scores)


class Afraid(GreedySearcher):
    def tell(self, widths, scores):
        if not all(math.isfinite(score) for score in scores):
            raise ValueError("a bad score")
        super().tell(widths, scores)


class Spendthrift(GreedySearcher):
    """Ends with the widest network."""

    told = False
    done = property(lambda self: self.told)

    def tell(self, widths, scores):
        super().tell(widths, scores)
        self.told = True


class Shared(GreedySearcher):
    """Looks again at the caller's list."""

    told = ()

    def ask(self):
        return super().ask()[: len(self.told[0]) if self.told else None]

    def tell(self, widths, scores):
        super().tell(widths, scores)
        self.told = widths


class Percent(GreedySearcher):
    progress = property(lambda self: 100.0)


SEARCHERS = {
    "replay": (Second, "test_told_scores_again_it_goes_on_identically", ()),
    "choice": (Elsewhere, "test_its_choice_was_judged", ()),
    "choice outside": (ChoosesTheWidest, "test_its_choice_was_judged", ()),
    "seed": (Unseeded, "test_the_seed_determines_the_search", ()),
    "endless": (Endless, "test_the_seed_determines_the_search", ()),
    "range": (Wide, "test_proposals_name_every_group_with_a_width_in_range", ("plain",)),
    "bad scores": (Afraid, "test_networks_that_diverge_do_not_stop_it", (math.nan, 2)),
    "budget": (Spendthrift, "test_something_inside_the_budget_is_proposed", ("plain", "0.5x")),
    "shared": (Shared, "test_proposals_belong_to_the_caller", ()),
    "progress": (Percent, "test_it_ends_and_stays_ended", ("0.5x",)),
}


@pytest.mark.parametrize(("searcher", "test", "arguments"), SEARCHERS.values(), ids=SEARCHERS)
def test_a_broken_searcher_fails(searcher, test, arguments):
    suite = SearcherConformance()
    getattr(suite, test)(GreedySearcher, *arguments)
    with pytest.raises(Exception, match=r".") as caught:
        getattr(suite, test)(searcher, *arguments)
    assert not isinstance(caught.value, (AttributeError, NameError, TypeError))


class Uneven(UniversallyAligned):
    def paths(self, width, choices):
        return super().paths(width, choices) * (2 if choices.name == "stem.0" else 1)


class Empty(UniversallyAligned):
    def paths(self, width, choices):
        return ()


class Past(UniversallyAligned):
    def paths(self, width, choices):
        return (np.arange(width) + choices.widest,)


class Listed(UniversallyAligned):
    def paths(self, width, choices):
        return (list(range(width)),)


class Half(UniversallyAligned):
    def capacity(self, choices):
        return choices.widest / 1


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (Uneven, "Uneven: paths.. must give equally many paths"),
        (Empty, "Empty: paths.. gives no path"),
        (Past, "Past: a path of width 2 of group 'stem.0' must be an array of 2 ascending units below 8"),
        (Listed, "Listed: a path of width 2"),
        (Half, "Half: capacity.. of group 'stem.0' must be a whole number"),
        (UniversallyAligned, "not an instance|registered name or an instance"),
    ],
)
def test_a_strategy_that_is_wrong_at_work_is_named(strategy, words):
    given = strategy if strategy is UniversallyAligned else strategy()
    with pytest.raises((PluginError, OptionError), match=words):
        make_supernet(small_net(), given, graph=small_graph(), k=4).paths(dict.fromkeys(small_graph().group_names, 2))
