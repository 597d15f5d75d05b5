"""Measure what one training step of every strategy costs: runs, time, memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import count

from torch import Tensor, nn

from benchmarks.common import step_context
from benchmarks.learn.memory import peak_bytes
from benchmarks.learn.records import Records, read_json
from widthkit.bench.files import machine
from widthkit.files import atomic_json
from widthkit.latency.timing import interleaved, keep_pages
from widthkit.registry import PluginChoice
from widthkit.supernet import Supernet
from widthkit.train.step import plain_step

_MEMORY_STEPS = 8
"""Steps draw random widths; the reported peak is the largest of this many steps."""


def measure(records: Records, choices: Sequence[PluginChoice], repeats: int, again: bool) -> None:
    """Write ``cost.json``: all strategies measured in turns, beside the dense model.

    Args:
        records: The model and its data.
        choices: The strategies.
        repeats: Timed steps of each.
        again: Measure even if all of them have been measured before.
    """
    file = records.folder / "cost.json"
    measured = {row["strategy"] for row in read_json(file)["rows"]} if file.exists() else set()
    if not again and measured >= {c.label for c in choices}:
        return
    # Times of different minutes do not compare, so strategies that were measured earlier are measured again.
    labels = sorted(measured - {"dense"} | {c.label for c in choices})
    keep_pages()
    batch = next(iter(records.loader("train")))
    nets = {c.label: records.supernet(c) for c in map(PluginChoice.read, labels)}
    steps = {"dense": _plain(records.setup.fresh(0), batch), **{n: _step(net, batch) for n, net in nets.items()}}
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
    records.say(f"{records.setup.model}: cost of a step, {len(rows)} rows")


def _plain(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], object]:
    net.train()

    def step() -> None:
        net.zero_grad()
        plain_step(net, step_context(*batch))

    return step


def _step(net: Supernet, batch: tuple[Tensor, Tensor]) -> Callable[[], object]:
    net.train()
    index = count()

    def step() -> None:
        net.zero_grad()
        net.train_step(step_context(*batch, next(index)))

    return step
