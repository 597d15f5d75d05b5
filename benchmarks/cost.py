"""Measure how long it takes to price many width vectors."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
from rich.console import Console

from widthkit.bench.files import write
from widthkit.latency.timing import interleaved
from widthkit.modules.models import create_model
from widthkit.trace import trace

_REPEATS = 11


def run(name: str, vectors: int, out: Path | None) -> None:
    """Evaluate the MACs polynomial for random width vectors and print the median time."""
    graph = trace(create_model(name))
    rng = np.random.default_rng(0)
    widths = rng.integers(1, graph.group_widths + 1, size=(vectors, len(graph.group_widths)))
    seconds = interleaved({"macs": lambda: graph.macs(widths)}, repeats=_REPEATS)["macs"]
    row = {"model": name, "vectors": vectors, "milliseconds": 1000 * statistics.median(seconds)}
    Console().print(f"{name}: {vectors} width vectors priced in {row['milliseconds']:.1f} ms", highlight=False)
    write(out, "cost", [row])
