"""What every strategy must hold to in training: steps, gradients, records, checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from widthkit.graph import IntArray
from widthkit.supernet import Supernet
from widthkit.supernet.strategy import StepCost, Strategy
from widthkit.testing.examples import SPACES, build_net, listed, make_step, small_batch, some_widths
from widthkit.train.checkpoint import load_tree, save_tree

_STEPS = 200
"""A strategy that has not trained a unit after this many steps never will."""


class TrainingTests:
    """The tests of :class:`~widthkit.testing.StrategyConformance` about training."""

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
        first, second = (_gradients(strategy, seed=3) for _ in range(2))
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
            assert listed(first.paths(widths)) == listed(second.paths(widths))

    def test_a_copied_strategy_does_the_same(self, strategy: Strategy) -> None:
        """A strategy is its options: one that was pickled (to another process) or built again from them is equal."""
        fields = dataclasses.fields(strategy)  # type: ignore[arg-type]
        options = {option.name: getattr(strategy, option.name) for option in fields}
        for twin in (pickle.loads(pickle.dumps(strategy)), type(strategy)(**options)):
            assert twin == strategy
            ours, theirs = _gradients(strategy, seed=1), _gradients(twin, seed=1)
            assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
        assert json.loads(json.dumps(options)) == options, (
            "options come from the command line and go into files as JSON"
        )

    def test_records_are_losses_of_trained_widths(self, strategy: Strategy) -> None:
        """What a step records, if anything, names every group and lies among the losses that the step computed."""
        for index in range(4):
            net = build_net(strategy)
            seen: list[float] = []

            def loss(outputs: Any, targets: Any, seen: list[float] = seen) -> Tensor:
                value = F.cross_entropy(outputs, targets)
                seen.append(float(value.detach()))
                return value

            net.train_step(make_step(index, index=index, loss=loss))
            net.width_history.end_epoch()
            for widths, recorded in net.width_history.records:
                assert all(1 <= widths[g.name] <= g.widest for g in net.space.groups), f"no such widths: {widths}"
                why = "record the loss on the labels, not a share or a sum of it"
                assert min(seen) - 1e-9 <= recorded <= max(seen) + 1e-9, why

    def test_a_step_learns_from_a_teacher(self, strategy: Strategy) -> None:
        """Where a run has a teacher, its part is in the gradients, and records are losses on the targets without it."""
        for index in range(4):
            seen: list[float] = []

            def loss(outputs: Any, targets: Any, seen: list[float] = seen) -> Tensor:
                value = F.cross_entropy(outputs, targets)
                seen.append(float(value.detach()))
                return value

            def teacher(outputs: Any, loss: Tensor) -> Tensor:
                disagreement: Tensor = outputs.square().mean()
                return loss + disagreement + 1000

            plain, taught = build_net(strategy), build_net(strategy)
            plain.train_step(make_step(index, index=index))
            taught.train_step(make_step(index, index=index, loss=loss, teacher=teacher))
            pairs = zip(plain.parameters(), taught.parameters(), strict=True)
            differ = [not torch.equal(p.grad, q.grad) for p, q in pairs if p.grad is not None and q.grad is not None]
            assert any(differ), "compute gradients of step.with_teacher(outputs, loss)"
            taught.width_history.end_epoch()
            why = "record the loss on the labels, without the teacher's part"
            assert all(recorded <= max(seen) + 1e-9 for _, recorded in taught.width_history.records), why


def _gradients(strategy: Strategy, seed: int) -> Mapping[str, Tensor]:
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


def _losses(net: Supernet, batch: tuple[Tensor, Tensor]) -> list[float]:
    inputs, targets = batch
    with torch.no_grad():
        return [
            float(torch.nn.functional.cross_entropy(net.run(net.paths(widths)[0], inputs), targets))
            for widths in (net.space.largest, net.space.smallest)
        ]
