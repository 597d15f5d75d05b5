"""Locally free sharing against CafeNet: patterns by hand and by brute force, min-min steps, max-max scores."""

import math
from itertools import combinations, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from widthkit_plugins.strategies.locally_free import LocallyFree

from widthkit.errors import OptionError
from widthkit.graph.space import GroupChoices
from widthkit.search.evaluator import Evaluator
from widthkit.supernet import make_supernet
from widthkit.testing import StrategyConformance, make_step


class TestLocallyFree(StrategyConformance):
    @pytest.fixture(params=[{}, {"offset": 2}, {"patterns": "layerwise", "samples": 2}], ids=str)
    def strategy(self, request):
        return LocallyFree(**request.param)


def units(choices):
    return GroupChoices("g", choices[-1], tuple(choices))


def sets(strategy, width, choices):
    return {tuple(found.tolist()) for found in strategy.all_patterns(width, choices)}


SIX = units(range(1, 7))


def test_the_example_of_the_papers_first_figure():
    # Fig. 1(b): six channels, r = 1; channels count from 0 here.
    expected = {
        1: {(0,), (1,)},
        2: {(0, 1), (0, 2), (1, 2)},
        3: {(0, 1, 2), (0, 1, 3), (0, 2, 3)},
        4: {(0, 1, 2, 3), (0, 1, 2, 4), (0, 1, 3, 4)},
        5: {(0, 1, 2, 3, 4), (0, 1, 2, 3, 5), (0, 1, 2, 4, 5)},
        6: {(0, 1, 2, 3, 4, 5)},
    }
    assert {c: sets(LocallyFree(), c, SIX) for c in range(1, 7)} == expected


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize("bin_size", [1, 3])
def test_patterns_are_all_choices_of_free_bins_in_the_clipped_zone(offset, bin_size):
    # Eq. 5 by brute force, for equal bins.
    n = 7
    choices = units([bin_size * i for i in range(1, n + 1)])
    for c in range(1, n + 1):
        base = max(c - offset - 1, 0)
        zone = [b for b in range(c - offset, c + offset + 1) if 1 <= b <= n]
        expected = set()
        for free in combinations([b for b in zone if b > base], c - base):
            bins = [*range(1, base + 1), *free]
            expected.add(tuple(u for b in bins for u in range((b - 1) * bin_size, b * bin_size)))
        found = LocallyFree(offset=offset).all_patterns(bin_size * c, choices)
        assert {tuple(f.tolist()) for f in found} == expected
        assert len(found) == math.comb(2 * offset + 1, offset + 1)


@pytest.mark.parametrize("options", [(2, 3, 7, 8, 16), (5, 6, 7), (1, 10, 11, 30), (4,)])
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_unequal_bins_keep_the_width_and_the_base(options, offset):
    choices = units(options)
    for width in range(1, options[-1] + 1):
        own = next(i for i, o in enumerate(options, start=1) if o >= width)
        base = (0, *options)[max(own - offset - 1, 0)]
        end = options[min(own + offset, len(options)) - 1]
        for found in LocallyFree(offset=offset).all_patterns(width, choices):
            assert len(set(found.tolist())) == width
            assert found[:base].tolist() == list(range(base))
            assert found.max() < end


def test_the_sharing_degree_lies_between_the_base_and_all():
    # Eq. 4: |I(c) and I(c')| / min(c, c') is at least (base channels of the smaller) / c, and below 1 somewhere.
    choices = units(range(1, 10))
    for offset in (0, 1, 2):
        strategy = LocallyFree(offset=offset)
        degrees = []
        for small, large in combinations(range(1, 10), 2):
            for a, b in product(strategy.all_patterns(small, choices), strategy.all_patterns(large, choices)):
                degree = len(np.intersect1d(a, b)) / min(len(a), len(b))
                assert max(small - offset - 1, 0) / small <= degree <= 1
                degrees.append(degree)
        # With no offset the pattern is the fixed one, whose degree is always 1 (Theorem 1).
        assert (min(degrees) < 1) == (offset > 0)
        assert max(degrees) == 1


# --- training and judging ---------------------------------------------------------------------------------------------


def batch(n=6):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((n, 3, 5, 5), generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 4, (n,), generator=generator)


def two_layers(strategy, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 4))
    return make_supernet(model.double(), strategy, example_inputs=batch()[0], **options)


def drawn(net, seed):
    return net.space.sample(net.rng(make_step(seed)))


def loss_of(net, path):
    images, labels = batch()
    return F.cross_entropy(net.run(path, images), labels)


@pytest.mark.parametrize("options", [{"k": 4}, {"bins": 1.0}], ids=["uniform", "bins"])
@pytest.mark.parametrize("seed", range(4))
def test_a_step_trains_the_pattern_of_least_loss(seed, options):
    net = two_layers(LocallyFree(), **options)
    paths = net.paths(drawn(net, seed))
    assert len(paths) == 3
    losses = [float(loss_of(net, path).detach()) for path in paths]
    best = int(np.argmin(losses))
    shown = net.train_step(make_step(seed, batch=batch()))
    actual = {name: p.grad.clone() for name, p in net.named_parameters()}
    assert float(shown) == pytest.approx(losses[best], abs=1e-12)
    net.zero_grad()
    loss_of(net, paths[best]).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("patterns", ["lockstep", "layerwise"])
def test_the_history_keeps_the_least_loss_of_the_candidates(patterns):
    """The one that is trained, not a mean that counts the others."""
    net = two_layers(LocallyFree(patterns=patterns, samples=5), k=4)
    expected = {}
    for seed in range(20):
        heard, widths = [], drawn(net, seed)

        def listen(outputs, targets, heard=heard):
            heard.append(F.cross_entropy(outputs, targets))
            return heard[-1]

        net.train_step(make_step(seed, batch=batch(), loss=listen))
        least = min(float(loss.detach()) for loss in heard)
        expected[tuple(widths.values())] = min(least, expected.get(tuple(widths.values()), math.inf))
    net.width_history.end_epoch()
    found = {tuple(widths.values()): loss for widths, loss in net.width_history.records}
    assert found == pytest.approx(expected, abs=1e-12)


def test_candidates_leave_no_gradient_and_only_one_backward_runs():
    net = two_layers(LocallyFree(), k=4)
    seen = []
    net.train_step(make_step(0, batch=batch(), backward=lambda loss: seen.append(loss)))
    assert len(seen) == 1
    assert all(p.grad is None for p in net.parameters())


def test_the_first_share_of_a_run_takes_random_patterns():
    net = two_layers(LocallyFree(random_first=0.5), k=4)
    early = late = 0
    for seed in range(40):
        least = min(float(loss_of(net, path).detach()) for path in net.paths(drawn(net, seed)))
        for progress in (0.25, 0.75):
            step = make_step(seed, batch=batch())
            step.progress = progress
            hit = float(net.train_step(step)) == pytest.approx(least, abs=1e-12)
            early, late = early + (hit and progress < 0.5), late + (hit and progress > 0.5)
    assert late == 40
    # A random one of three different patterns is the best by luck only.
    assert early < 35


def test_layerwise_patterns_differ_between_layers():
    net = two_layers(LocallyFree(patterns="layerwise", samples=40), k=6)
    widths = {"0": net.space.groups[0].options[3], "2": net.space.groups[1].options[3]}
    seen = set()
    for path in net.paths(widths):
        seen.add(tuple(tuple(path[name].tolist()) for name in ("0", "2")))
    # All combinations of three patterns in each of two layers.
    assert len(seen) == 9
    lockstep = make_supernet(net.model, LocallyFree(), graph=net.graph, space=net.space).paths(widths)
    assert len({tuple(tuple(path[name].tolist()) for name in ("0", "2")) for path in lockstep}) == 3


def test_a_width_is_worth_its_best_pattern():
    # Eq. 13.
    net = two_layers(LocallyFree(), k=4)
    widths = {"0": 4, "2": 3}
    score = Evaluator(net, [batch()], F.cross_entropy)(widths).score
    assert score == pytest.approx(-min(float(loss_of(net, path).detach()) for path in net.paths(widths)), abs=1e-12)
    assert LocallyFree().combine([math.nan, 0.25, 0.5]) == 0.5
    assert math.isnan(LocallyFree().combine([math.nan, math.nan]))


@pytest.mark.parametrize(
    "options", [{"offset": -1}, {"random_first": 1.5}, {"patterns": "free"}, {"samples": 0}], ids=str
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        LocallyFree(**options)
