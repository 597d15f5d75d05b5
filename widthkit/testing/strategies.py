"""What every strategy must hold to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch

from widthkit.search.evaluator import Evaluator
from widthkit.supernet.strategy import Strategy
from widthkit.testing.examples import build_net, listed, make_step, small_batch, some_widths
from widthkit.testing.strategy_training import TrainingTests
from widthkit.testing.strategy_units import UnitTests


class StrategyConformance(UnitTests, TrainingTests):
    """Subclass this, name the class ``Test...``, and give it a fixture ``strategy`` that returns an instance.

    >>> from widthkit.supernet.strategy import STRATEGIES, make_strategy
    >>> class TestTheDefault(StrategyConformance):
    ...     @pytest.fixture
    ...     def strategy(self):
    ...         return make_strategy(STRATEGIES.default, {})

    Override ``tolerance`` only if sums are taken in another order than in the exported network.
    """

    @pytest.fixture
    def strategy(self) -> Strategy:
        """Return the strategy under test; every subclass overrides this."""
        raise NotImplementedError(f"{type(self).__name__} needs a fixture 'strategy' that returns a strategy")

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> Iterator[None]:
        """On tensors this small threads only wait for one another."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    # --- the object ---------------------------------------------------------------------------------------------------

    def test_strategy_is_a_frozen_dataclass(self, strategy: Strategy) -> None:
        """Options are fixed and shown, so that a run can say what it was made with."""
        assert isinstance(strategy, Strategy)
        assert dataclasses.is_dataclass(strategy), "decorate the class with @dataclass(frozen=True)"
        assert strategy.__dataclass_params__.frozen, "decorate the class with @dataclass(frozen=True)"  # type: ignore[attr-defined]
        twin = dataclasses.replace(strategy)
        assert (repr(twin), twin, hash(twin)) == (repr(strategy), strategy, hash(strategy))
        assert " at 0x" not in repr(strategy), "a repr with a memory address differs between runs"
        for option in dataclasses.fields(strategy):
            assert f"{option.name}=" in repr(strategy)

    def test_strategy_has_a_summary_for_the_plugin_list(self, strategy: Strategy) -> None:
        """``widthkit plugins`` shows the first line of the class's docstring."""
        assert (type(strategy).__doc__ or "").strip()

    def test_hooks_have_the_agreed_forms(self, strategy: Strategy) -> None:
        """A module or nothing, units or nothing, figures that a history can hold."""
        net = build_net(strategy)
        net.train_step(make_step())
        net.after_update()
        assert net.policy is None or isinstance(net.policy, torch.nn.Module)
        assert all(isinstance(value, float) for value in net.end_epoch().values())
        assert isinstance(strategy.for_budget("0.5x"), type(strategy))
        chosen = net.chosen()
        if chosen is not None:
            # Exporting the widths must give the units that training chose.
            widths = {name: len(units) for name, units in chosen.items()}
            assert listed(net.paths(widths)[:1]) == listed([chosen])

    # --- judging ------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("space", ["single choice", "shrink and grow"])
    def test_every_width_of_every_group_is_judged(self, strategy: Strategy, space: str) -> None:
        """The evaluator gives each a finite score, the same one twice, and leaves the supernet as it was."""
        net = build_net(strategy, space)
        judge = Evaluator(net, [small_batch(n=16)], torch.nn.functional.cross_entropy)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        for choices in net.space.groups:
            for width in choices.options:
                found = judge({**net.space.smallest, choices.name: width})
                assert math.isfinite(found.score)
                assert found.accuracy is not None
        assert judge(net.space.smallest) == judge(net.space.smallest)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    def test_scores_that_are_no_numbers_never_win(self, strategy: Strategy) -> None:
        """A path that diverged spoils the result or is left out, wherever it stands among the others."""
        net = build_net(strategy)
        n = len(net.paths(net.space.largest))
        assert not math.isfinite(strategy.combine([math.nan] * n))
        results = {_shown(strategy.combine([0.5] * i + [math.nan] + [0.5] * (n - 1 - i))) for i in range(n)}
        assert len(results) == 1, "the place of a NaN among the paths must not matter"
        assert results <= {"nan", "-inf", _shown(0.5)}

    def test_scores_of_all_paths_become_one(self, strategy: Strategy) -> None:
        """Equal scores combine to that score; a better one never makes the result worse."""
        net = build_net(strategy)
        for widths in some_widths(net, n=2):
            n = len(net.paths(widths))
            assert strategy.combine([0.25] * n) == pytest.approx(0.25)
            assert strategy.combine([0.5] + [0.25] * (n - 1)) >= strategy.combine([0.25] * n)


def _shown(score: float) -> str:
    return f"{score:.9f}" if math.isfinite(score) else str(score)
