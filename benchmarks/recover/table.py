"""The table of all rows: mean and deviation over seeds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.recover.run import rows
from widthkit.bench.files import write


def write_table(folder: Path, out: Path | None, epochs: float, lr: float, title: str) -> None:
    """Write ``recover.json`` and the table beside it as Markdown.

    Args:
        folder: Where the rows are.
        out: The JSON file; ``None`` only prints.
        epochs: Total cost of every way.
        lr: Learning rate of all trainings.
        title: Network and data.
    """
    found: list[dict[str, Any]] = rows(folder)
    text = markdown(found, epochs, title)
    print(text)
    if out is not None:
        write(out, "recover", found, epochs=epochs, lr=lr)
        out.with_suffix(".md").write_text(text, encoding="utf-8")


def markdown(found: list[dict[str, Any]], epochs: float, title: str) -> str:
    """Return the table of every speed-up."""
    groups: dict[tuple[float, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        groups[row["speedup"], row["way"], row["whose"]].append(row)
    held_out = {key: statistics.fmean(row["held_out"] for row in group) for key, group in groups.items()}
    lines = [
        f"{title}; every way costs {epochs:g} epochs of the dense network in all. Ways are in the order of their "
        "accuracy on held-out training images; no test image decides anything.",
        "",
        "| times fewer MACs | way | by | seeds | final epochs | held-out accuracy | test accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in sorted(groups, key=lambda key: (key[0], -held_out[key])):
        speedup, way, whose = key
        tests = [100 * row["test"] for row in groups[key]]
        spread = f" ± {statistics.stdev(tests):.2f}" if len(tests) > 1 else ""
        trained = statistics.fmean(row["final_epochs"] for row in groups[key])
        lines.append(
            f"| {speedup:g} | {way} | {whose} | {len(tests)} | {trained:g} | {100 * held_out[key]:.2f} "
            f"| {statistics.fmean(tests):.2f}{spread} |"
        )
    return "\n".join([*lines, ""])
