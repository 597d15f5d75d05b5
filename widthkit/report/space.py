"""Describe a search space: a table, JSON, and a picture of the bins of every layer (CafeNet, Fig. 5)."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from widthkit.budget import show_count
from widthkit.graph.space import SearchSpace
from widthkit.report.png import png_bytes
from widthkit.supernet.strategy import Strategy
from widthkit.supernet.usage import unevenness
from widthkit.version import __version__

_SHOWN = 5


def space_json(space: SearchSpace, strategy: Strategy | None = None) -> dict[str, Any]:
    """Return a search space as JSON values; the size is text, because JSON readers round large numbers.

    Args:
        space: The choices.
        strategy: Adds how evenly its sub-networks use the units: the largest over the smallest use, for every group.
    """
    graph = space.graph
    uneven = unevenness(strategy, space) if strategy is not None else {}
    sensitivity = graph.sensitivity(space.largest)
    return {
        "format": 1,
        "widthkit": __version__,
        "size": str(space.size),
        "log10_size": math.log10(space.size),
        "macs": {"narrowest": graph.macs(space.smallest), "widest": graph.macs(space.largest)},
        "params": {"narrowest": graph.params(space.smallest), "widest": graph.params(space.largest)},
        "divisor": space.divisor,
        "groups": [
            {
                "name": g.name,
                "width": g.width,
                "macs_per_unit": float(sensitivity[graph.group_names.index(g.name)]),
                "bin_size": bin_size(g.options),
                "choices": list(g.options),
                **({"unevenness": uneven[g.name]} if uneven else {}),
            }
            for g in space.groups
        ],
    }


def bin_size(options: tuple[int, ...]) -> float:
    """Return the mean number of channels between two choices; the whole width if there is only one choice.

    >>> bin_size((10, 20, 30, 36)), bin_size((64,))
    (8.666666666666666, 64.0)
    """
    return (options[-1] - options[0]) / (len(options) - 1) if len(options) > 1 else float(options[0])


def space_text(space: SearchSpace, name: str, strategy: Strategy) -> None:
    """Print a search space as a table, with how evenly a strategy uses the units."""
    console = Console(soft_wrap=False)
    data = space_json(space, strategy)
    console.print(
        f"{name}: {len(space.groups)} groups, {show_size(space.size)} width vectors; "
        f"{show_count(data['macs']['narrowest'])} to {show_count(data['macs']['widest'])} MACs, "
        f"{show_count(data['params']['narrowest'])} to {show_count(data['params']['widest'])} params",
        highlight=False,
    )
    table = Table("group", "units", "MACs per unit", "choices", "bin", "use", "widths", box=None, pad_edge=False)
    for column in table.columns[1:6]:
        column.justify = "right"
    for group in data["groups"]:
        table.add_row(
            group["name"],
            str(group["width"]),
            show_count(group["macs_per_unit"]),
            str(len(group["choices"])),
            f"{group['bin_size']:.3g}",
            f"{group['unevenness']:.3g}",
            _shown(group["choices"]),
        )
    console.print(table, highlight=False)
    console.print(f"use: largest over smallest number of sub-networks that use a unit, {strategy}", highlight=False)


def show_size(size: int) -> str:
    """Write a number of width vectors.

    >>> show_size(4096), show_size(10**25), show_size(20**25)
    ('4096', '1.0e25', '3.4e32')
    """
    if size < 100_000:
        return str(size)
    power = len(str(size)) - 1
    tenths = (size * 100 // 10**power + 5) // 10  # with many groups the integer is too large for a float
    return f"{tenths // 10}.{tenths % 10}e{power}" if tenths < 100 else f"1.0e{power + 1}"


def _shown(choices: list[int]) -> str:
    if len(choices) <= _SHOWN:
        return " ".join(map(str, choices))
    return f"{' '.join(map(str, choices[: _SHOWN - 2]))} ... {choices[-1]}"


def draw_space(space: SearchSpace, name: str) -> bytes:
    """Draw bin size, number of choices and MACs per unit of every group, as a PNG."""
    from matplotlib.figure import Figure

    data = space_json(space)["groups"]
    positions = range(len(data))
    figure = Figure(figsize=(max(6.0, 0.22 * len(data) + 2), 7), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    rows = [
        ("channels per bin", [g["bin_size"] for g in data]),
        ("choices", [len(g["choices"]) for g in data]),
        ("MACs per channel", [g["macs_per_unit"] for g in data]),
    ]
    for panel, (label, values) in zip(panels, rows, strict=True):
        panel.bar(positions, values, color="tab:blue")
        panel.set_ylabel(label)
        panel.spines[["top", "right"]].set_visible(False)
        if min(values) > 0 and max(values) > 20 * min(values):
            panel.set_yscale("log")
    panels[0].set_title(f"{name}: {show_size(space.size)} width vectors")
    panels[-1].set_xticks(list(positions), [g["name"] for g in data], rotation=90, fontsize=7)
    return png_bytes(figure)
