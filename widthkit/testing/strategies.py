"""What every strategy must hold to."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from widthkit.export import dense
from widthkit.graph import IntArray
from widthkit.search.evaluator import Evaluator
from widthkit.supernet import Supernet, make_supernet
from widthkit.supernet.strategy import StepCost, Strategy
from widthkit.testing.examples import SPACES, build_space, make_step, small_batch, small_graph, small_net
from widthkit.train.checkpoint import load_tree, save_tree

_STEPS = 200
"""A strategy that has not trained a unit after this many steps never will."""


def build_net(strategy: Strategy, space: str = "plain", seed: int = 0) -> Supernet:
    """Build a supernet of :func:`small_net` over one of :data:`SPACES`."""
    graph = small_graph()
    return make_supernet(small_net(seed), strategy, graph=graph, space=build_space(space, graph))


def some_widths(net: Supernet, n: int = 6) -> list[dict[str, int]]:
    """Return the widest, the narrowest and ``n`` random width vectors of a supernet's space."""
    rng = np.random.default_rng(0)
    return [net.space.largest, net.space.smallest, *(net.space.sample(rng) for _ in range(n))]


class StrategyConformance:
    """Subclass this, name the class ``Test...``, and give it a fixture ``strategy`` that returns an instance.

    >>> class TestUniversallyAligned(StrategyConformance):
    ...     @pytest.fixture
    ...     def strategy(self):
    ...         from widthkit_plugins.strategies.ua import UniversallyAligned
    ...         return UniversallyAligned(n_random=1)

    Override :attr:`tolerance` only if sums are taken in another order than in the exported network.
    """

    tolerance = 1e-10

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

    # --- units --------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("space", SPACES)
    def test_capacity_covers_the_widest_choice(self, strategy: Strategy, space: str) -> None:
        """A supernet must hold every choice."""
        for choices in build_net(strategy, space).space.groups:
            capacity = strategy.capacity(choices)
            assert isinstance(capacity, int)
            assert capacity >= choices.widest

    @pytest.mark.parametrize("space", SPACES)
    def test_paths_name_distinct_ascending_units_inside_the_capacity(self, strategy: Strategy, space: str) -> None:
        """Of every width between the narrowest and the widest, not only of the choices."""
        for choices in build_net(strategy, space).space.groups:
            for width in range(choices.narrowest, choices.widest + 1):
                paths = strategy.paths(width, choices)
                assert len(paths) >= 1
                for units in paths:
                    assert np.asarray(units).shape == (width,)
                    assert np.issubdtype(np.asarray(units).dtype, np.integer)
                    assert (np.diff(units) > 0).all(), f"width {width}: units {units} are not ascending"
                    assert 0 <= units[0] <= units[-1] < strategy.capacity(choices)

    def test_paths_are_deterministic(self, strategy: Strategy) -> None:
        """The exported units must be the ones that were measured."""
        for choices in build_net(strategy).space.groups:
            for width in choices.options:
                first, second = strategy.paths(width, choices), strategy.paths(width, choices)
                assert [list(a) for a in first] == [list(b) for b in second]

    @pytest.mark.parametrize("space", SPACES)
    def test_every_path_of_a_width_vector_runs(self, strategy: Strategy, space: str) -> None:
        """Also where the space has one choice, shrinks, or grows."""
        net, (inputs, _) = build_net(strategy, space), small_batch()
        for widths in some_widths(net):
            for units in net.paths(widths):
                assert {name: len(u) for name, u in units.items()} == widths
                with torch.no_grad():
                    assert net.run(units, inputs).isfinite().all()

    @pytest.mark.parametrize("space", ["plain", "shrink and grow"])
    def test_a_subnetwork_is_its_exported_network(self, strategy: Strategy, space: str) -> None:
        """In float64, on every path."""
        net, (inputs, _) = build_net(strategy, space).eval(), small_batch()
        for widths in some_widths(net, n=3):
            for path in range(len(net.paths(widths))):
                with torch.no_grad():
                    expected = net.set_widths(widths, path)(inputs)
                    actual = dense.export(net, widths, path=path)(inputs)
                torch.testing.assert_close(actual, expected, rtol=0, atol=self.tolerance)

    # --- training -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("space", SPACES)
    def test_a_step_gives_a_finite_detached_loss_and_gradients(self, strategy: Strategy, space: str) -> None:
        """On every kind of space."""
        net = build_net(strategy, space)
        loss = net.train_step(make_step())
        assert isinstance(loss, Tensor)
        assert loss.shape == ()
        assert not loss.requires_grad
        assert math.isfinite(float(loss))
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())

    def test_a_step_leaves_weights_to_the_optimiser(self, strategy: Strategy) -> None:
        """Parameters keep values and shapes, modules their training flags, the user's generators their states."""
        net = build_net(strategy)
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        states = torch.get_rng_state(), str(np.random.get_state())
        net.train_step(make_step())
        assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
        assert all(module.training for module in net.modules())
        assert torch.equal(torch.get_rng_state(), states[0]), "draw from net.rng(step) or step.generator"
        assert str(np.random.get_state()) == states[1], "draw from net.rng(step) or step.generator"

    def test_the_seed_determines_a_step(self, strategy: Strategy) -> None:
        """The same generator state gives bit-identical losses and gradients."""
        first, second = (self._gradients(strategy, seed=3) for _ in range(2))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_a_step_costs_what_it_declares(self, strategy: Strategy) -> None:
        """Count real forwards and backwards."""
        net = build_net(strategy)
        counts = {"forwards": 0, "backwards": 0}

        def count_forward(*_: Any) -> None:
            counts["forwards"] += 1

        def backward(loss: Tensor) -> None:
            counts["backwards"] += 1
            loss.backward()

        handle = net.model.register_forward_pre_hook(count_forward)
        try:
            for index in range(4):
                counts.update(forwards=0, backwards=0)
                net.train_step(make_step(index, index=index, backward=backward))
                assert StepCost(counts["forwards"], counts["backwards"]) == strategy.cost
        finally:
            handle.remove()

    @pytest.mark.parametrize("space", ["plain", "shrink and grow", "single choice"])
    def test_every_unit_is_trained(self, strategy: Strategy, space: str) -> None:
        """After enough steps every unit of every group has had a gradient, at every place where it lives."""
        net = build_net(strategy, space)
        parameters = dict(net.model.named_parameters())
        touched = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in parameters.items()}
        for index in range(_STEPS):
            net.zero_grad()
            net.train_step(make_step(index, index=index, batch=small_batch(index)))
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    touched[name] |= parameter.grad != 0
            if not list(_untrained(net, touched)):
                return
        assert list(_untrained(net, touched)) == []

    def test_training_learns(self, strategy: Strategy) -> None:
        """A few updates on one batch lower the loss of the widest and of the narrowest network."""
        net, batch = build_net(strategy), small_batch(n=16)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        before = _losses(net, batch)
        for index in range(40):
            optimizer.zero_grad()
            net.train_step(make_step(index, index=index, batch=batch))
            optimizer.step()
        assert all(after < b for after, b in zip(_losses(net, batch), before, strict=True))

    @pytest.mark.parametrize("space", ["plain", "shrink and grow"])
    def test_training_can_be_stored_and_continued(self, strategy: Strategy, space: str, tmp_path: Path) -> None:
        """What a strategy learns lives in the supernet's state, goes through a checkpoint, and is all there is."""
        first, second = build_net(strategy, space), build_net(strategy, space, seed=1)
        for index in range(2):
            _update(first, index)
        save_tree(tmp_path / "state.safetensors", first.state_dict())
        second.load_state_dict(load_tree(tmp_path / "state.safetensors"))
        for index in range(2, 4):
            _update(first, index)
            _update(second, index)
        assert first.end_epoch() == second.end_epoch()
        ours, theirs = first.state_dict(), second.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), "keep state in net.policy"
        for widths in some_widths(first, n=2):
            assert _listed(first.paths(widths)) == _listed(second.paths(widths))

    def test_a_copied_strategy_does_the_same(self, strategy: Strategy) -> None:
        """A strategy is its options: one that was pickled (to another process) or built again from them is equal."""
        fields = dataclasses.fields(strategy)  # type: ignore[arg-type]
        options = {option.name: getattr(strategy, option.name) for option in fields}
        for twin in (pickle.loads(pickle.dumps(strategy)), type(strategy)(**options)):
            assert twin == strategy
            ours, theirs = self._gradients(strategy, seed=1), self._gradients(twin, seed=1)
            assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
        assert json.loads(json.dumps(options)) == options, (
            "options come from the command line and go into files as JSON"
        )

    def test_hooks_have_the_agreed_forms(self, strategy: Strategy) -> None:
        """A module or nothing, units or nothing, figures that a history can hold."""
        net = build_net(strategy)
        net.train_step(make_step())
        assert net.policy is None or isinstance(net.policy, torch.nn.Module)
        assert all(isinstance(value, float) for value in net.end_epoch().values())
        assert isinstance(strategy.for_budget("0.5x"), type(strategy))
        chosen = net.chosen()
        if chosen is not None:
            # Exporting the widths must give the units that training chose.
            widths = {name: len(units) for name, units in chosen.items()}
            assert _listed(net.paths(widths)[:1]) == _listed([chosen])

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

    def _gradients(self, strategy: Strategy, seed: int) -> Mapping[str, Tensor]:
        net = build_net(strategy)
        loss = net.train_step(make_step(seed))
        grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        return {**grads, "loss": loss}


def _untrained(net: Supernet, touched: Mapping[str, Tensor]) -> Iterator[tuple[str, str, list[int]]]:
    for group in net.wide_graph.groups.values():
        for site in group.sites:
            if site.tensor in touched:
                missing = _missing(touched[site.tensor], site.dim, site.index)
                if missing:
                    yield group.name, f"{site.tensor}[{site.dim}]", missing


def _missing(touched: Tensor, dim: int, index: IntArray) -> list[int]:
    rows = touched.movedim(dim, 0)[torch.from_numpy(index)]
    untouched: list[int] = (~rows.flatten(1).any(dim=1)).nonzero().flatten().tolist()
    return untouched


def _update(net: Supernet, index: int) -> None:
    """Take one step of plain gradient descent, which keeps no state of its own."""
    net.zero_grad()
    net.train_step(make_step(index, index=index, batch=small_batch(index)))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.05)


def _listed(paths: Sequence[Mapping[str, IntArray]]) -> list[dict[str, list[int]]]:
    return [{name: np.asarray(units).tolist() for name, units in path.items()} for path in paths]


def _shown(score: float) -> str:
    return f"{score:.9f}" if math.isfinite(score) else str(score)


def _losses(net: Supernet, batch: tuple[Tensor, Tensor]) -> list[float]:
    inputs, targets = batch
    with torch.no_grad():
        return [
            float(torch.nn.functional.cross_entropy(net.run(net.paths(widths)[0], inputs), targets))
            for widths in (net.space.largest, net.space.smallest)
        ]
