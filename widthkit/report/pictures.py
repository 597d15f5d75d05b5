"""Pictures of one run as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from widthkit.budget import show_count
from widthkit.report.png import png_bytes
from widthkit.search import SearchResult


def draw_accuracy(table: Sequence[dict[str, Any]]) -> bytes:
    """Draw the accuracy of the compared networks: every training, their mean and standard deviation, as a PNG.

    Args:
        table: The rows of ``results.json``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 0.55 * len(table) + 1.6), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(table):
        color = "#d1662b" if row["network"] == "searched" else "#2f6f9f"
        seeds = [100 * value for value in row["accuracy"]]
        axes.scatter(seeds, [place] * len(seeds), s=14, color="#9aa5b1", label="one training" if not place else None)
        mean, spread = 100 * row["accuracy_mean"], 100 * (row["accuracy_std"] or 0.0)
        axes.errorbar([mean], [place], xerr=[spread], fmt="o", color=color, capsize=4)
    axes.axvline(100 * table[0]["accuracy_mean"], color="#d9dde2", zorder=0)
    axes.set_yticks(range(len(table)), [f"{row['network']}\n{show_count(row['macs'])} MACs" for row in table])
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy (%): mean and standard deviation over trainings")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")
    return png_bytes(figure)


def draw_widths(result: SearchResult, widths: dict[str, dict[str, int]]) -> bytes:
    """Draw the width of every channel group in the dense, the uniform and the searched network, as a PNG."""
    from matplotlib.figure import Figure

    full = result.full["widths"]
    names = list(full)
    figure = Figure(figsize=(max(6.4, 0.32 * len(names) + 2), 4.8), layout="constrained")
    axes = figure.subplots()
    places = range(len(names))
    axes.bar(places, [full[n] for n in names], color="#d9dde2", label="dense", width=0.85)
    axes.bar(places, [result.widths.get(n, full[n]) for n in names], color="#2f6f9f", label="searched", width=0.5)
    if "uniform" in widths:
        axes.step(
            [p + 0.5 for p in range(-1, len(names))],
            [widths["uniform"][names[0]], *[widths["uniform"][n] for n in names]],
            where="pre",
            color="#d1662b",
            label="uniform",
        )
    axes.set_xticks(list(places), names, rotation=90, fontsize=max(4, 9 - len(names) // 25))
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylabel("width (channels)")
    share = result.macs / result.full["macs"]
    axes.set_title(f"Widths per channel group: {show_count(result.macs)} MACs, {share:.1%} of the dense model")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return png_bytes(figure)


def draw_search(result: SearchResult) -> bytes:
    """Draw all judged networks by MACs and score, with the Pareto set and a budget in MACs, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    finite = [t for t in result.trials if t.score == t.score and abs(t.score) != float("inf")]
    axes.scatter([t.macs / 1e6 for t in finite], [t.score for t in finite], s=10, color="#9aa5b1", label="judged")
    front = result.pareto
    axes.plot([t.macs / 1e6 for t in front], [t.score for t in front], color="#2f6f9f", marker=".", label="Pareto set")
    chosen = "chosen, by the score model" if "prediction" in result.settings else "chosen"
    axes.scatter([result.macs / 1e6], [result.score], color="#d1662b", zorder=3, label=chosen)
    for limit in result.settings.get("limits", []):
        if limit["kind"] == "macs":
            axes.axvspan(limit["value"] / 1e6, axes.get_xlim()[1], color="#f1e4dc", zorder=0, label="above the budget")
    axes.set_xlabel("MACs (millions)")
    axes.set_ylabel("score in the supernet (minus loss)")
    how = "widths chosen" if result.searcher == "training" else f"{len(result.trials)} networks judged"
    kind = "training" if result.searcher == "training" else f"{result.searcher} search"
    axes.set_title(f"{kind}, budget {result.budget}: {how}")
    axes.legend(edgecolor="white")
    axes.spines[["top", "right"]].set_visible(False)
    return png_bytes(figure)
