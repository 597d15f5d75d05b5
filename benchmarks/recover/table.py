"""The table of all rows: mean and deviation over seeds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.recover.run import rows
from widthkit.bench.files import write


def write_table(folder: Path, out: Path | None, epochs: float, lr: float) -> None:
    """Write ``recover.json`` and the table beside it as Markdown.

    Args:
        folder: Where the rows are.
        out: The JSON file; ``None`` only prints.
        epochs: Total cost of every way.
        lr: Learning rate of all trainings.
    """
    found: list[dict[str, Any]] = rows(folder)
    text = markdown(found, epochs)
    print(text)
    if out is not None:
        write(out, "recover", found, epochs=epochs, lr=lr)
        out.with_suffix(".md").write_text(text, encoding="utf-8")


def markdown(found: list[dict[str, Any]], epochs: float) -> str:
    """Return the table, the best way of every speed-up first."""
    groups: dict[tuple[float, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        groups[row["speedup"], row["way"], row["whose"]].append(row)
    means = {key: statistics.fmean(row["test"] for row in group) for key, group in groups.items()}
    lines = [
        f"ResNet-20 on CIFAR-10, 91.73 % dense; every way costs {epochs:g} epochs of the dense network in all.",
        "",
        "| times fewer MACs | way | by | seeds | test accuracy | before the final training (held out) |",
        "|---|---|---|---|---|---|",
    ]
    for key in sorted(groups, key=lambda key: (key[0], -means[key])):
        speedup, way, whose = key
        tests = [100 * row["test"] for row in groups[key]]
        spread = f" ± {statistics.stdev(tests):.2f}" if len(tests) > 1 else ""
        before = statistics.fmean(100 * row["held_out_before"] for row in groups[key])
        lines.append(
            f"| {speedup:g} | {way} | {whose} | {len(tests)} | {statistics.fmean(tests):.2f}{spread} | {before:.1f} |"
        )
    return "\n".join([*lines, ""])
