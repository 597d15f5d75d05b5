"""What one training step of every strategy costs: runs, time, memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.learn.memory import peak_bytes
from benchmarks.learn.run import Bench, Contender, read_json
from widthkit.bench.files import machine
from widthkit.files import atomic_json
from widthkit.latency.timing import interleaved, keep_pages
from widthkit.supernet import Supernet
from widthkit.train.losses import cross_entropy
from widthkit.train.step import StepContext, plain_step

_MEMORY_STEPS = 8
"""Steps draw widths; the largest peak of a few steps stands for all."""


def measure(bench: Bench, contenders: Sequence[Contender], repeats: int, again: bool) -> None:
    """Write ``cost.json``: all strategies measured in turns, beside the dense model.

    Args:
        bench: The model and its data.
        contenders: The strategies.
        repeats: Timed steps of each.
        again: Measure although all of them have been measured before.
    """
    file = bench.folder / "cost.json"
    known = {row["strategy"] for row in read_json(file)["rows"]} if file.exists() else set()
    if not again and known >= {c.label for c in contenders}:
        return
    # Times that were measured in different minutes cannot be compared, so the earlier ones are measured again.
    labels = sorted(known - {"dense"} | {c.label for c in contenders})
    keep_pages()
    batch = next(iter(bench.loader("train")))
    nets = {c.label: bench.supernet(c) for c in map(Contender.read, labels)}
    steps = {"dense": _plain(bench.setup.fresh(0), batch), **{n: _step(net, batch) for n, net in nets.items()}}
    memory = {name: max(peak_bytes(step) for _ in range(_MEMORY_STEPS)) for name, step in steps.items()}
    times = interleaved(steps, repeats=repeats)
    dense = statistics.median(times["dense"])
    rows = []
    for name in steps:
        cost = nets[name].strategy.cost if name in nets else None
        rows.append(
            {
                "strategy": name,
                "forwards": cost.forwards if cost else 1,
                "backwards": cost.backwards if cost else 1,
                "step_ms": 1000 * statistics.median(times[name]),
                "times_dense": statistics.median(times[name]) / dense,
                "peak_bytes": memory[name],
            }
        )
    atomic_json(file, {"machine": machine(), "batch_size": len(batch[1]), "repeats": repeats, "rows": rows})
    bench.say(f"{bench.setup.model}: cost of a step, {len(rows)} rows")


def _plain(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], object]:
    net.train()

    def step() -> None:
        net.zero_grad()
        plain_step(net, _context(batch, 0))

    return step


def _step(net: Supernet, batch: tuple[Tensor, Tensor]) -> Callable[[], object]:
    net.train()
    index = count()

    def step() -> None:
        net.zero_grad()
        net.train_step(_context(batch, next(index)))

    return step


def _context(batch: tuple[Tensor, Tensor], index: int) -> StepContext:
    def backward(loss: Tensor) -> Any:
        loss.backward()

    generator = torch.Generator().manual_seed(index)
    return StepContext(*batch, index, 0, cross_entropy(), backward, generator, nullcontext)
