"""Output of the command line: tables for people, JSON for programs."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from widthkit.budget import show_count
from widthkit.graph import ChannelGraph, ChannelGroup
from widthkit.registry import Registry
from widthkit.search import SEARCHERS
from widthkit.search.score_model import SCORE_MODELS
from widthkit.supernet.strategy import STRATEGIES
from widthkit.trace.rules import RULES
from widthkit.version import __version__

_UNSURPRISING = ("size 1", "not a floating-point tensor", "size of a convolution kernel")


def graph_json(graph: ChannelGraph) -> dict[str, Any]:
    """Return a channel graph as JSON values."""
    share = graph.cost.group_share(graph.vector())
    return {
        "format": 1,
        "widthkit": __version__,
        "macs": graph.macs(),
        "params": graph.params(),
        "searchable_macs_share": graph.cost.searchable_share(graph.vector()),
        "groups": [
            {
                "name": group.name,
                "width": group.width,
                "macs_share": float(share[g]),
                "sites": [
                    {"tensor": s.tensor, "dim": s.dim, "positions_per_unit": s.index.shape[1]} for s in group.sites
                ],
            }
            for g, group in enumerate(graph.groups.values())
        ],
        "frozen": dict(graph.frozen),
        "notes": list(graph.notes),
    }


def graph_text(graph: ChannelGraph, name: str, *, verbose: bool = False) -> None:
    """Print a channel graph as tables."""
    console = Console(soft_wrap=False)
    share = graph.cost.group_share(graph.vector())
    searchable = graph.cost.searchable_share(graph.vector())
    console.print(
        f"{name}: {len(graph.group_names)} channel groups, {int(graph.group_widths.sum())} units, "
        f"{show_count(graph.macs())} MACs ({searchable:.1%} searchable), {show_count(graph.params())} params",
        highlight=False,
    )
    table = Table("group", "units", "tied", "MACs", box=None, pad_edge=False)
    table.columns[1].justify = table.columns[3].justify = "right"
    for g, group in enumerate(graph.groups.values()):
        table.add_row(group.name, str(group.width), tied(graph, group, verbose), f"{share[g]:.1%}")
    console.print(table, highlight=False)
    _print_frozen(console, graph, verbose)
    for note in graph.notes:
        console.print(f"note: {note}", highlight=False)


def tied(graph: ChannelGraph, group: ChannelGroup, verbose: bool = False) -> str:
    """Say which modules a group ties: those that write its channels, those that read them, those that follow."""
    roles: dict[str, list[str]] = {"written by": [], "read by": [], "with": []}
    for site in group.sites:
        module, _, kind = site.tensor.rpartition(".")
        info = graph.tensors[site.tensor]
        if kind != "weight" or len(info.shape) < 2 or site.dim > 1:
            roles["with"].append(module)
        elif site.dim == (0 if info.transposed else 1):
            roles["read by"].append(module)
        else:
            roles["written by"].append(module)
    parts = []
    for role, modules in roles.items():
        unique = [m for m in dict.fromkeys(modules) if role != "with" or m not in roles["written by"]]
        if unique:
            shown = unique if verbose or len(unique) <= 3 else [*unique[:2], f"{len(unique) - 2} more"]
            parts.append(f"{role} {', '.join(shown)}")
    return "; ".join(parts)


def _print_frozen(console: Console, graph: ChannelGraph, verbose: bool) -> None:
    shown = {key: why for key, why in graph.frozen.items() if why not in _UNSURPRISING}
    if verbose:
        console.print("frozen:")
        for key, why in graph.frozen.items():
            console.print(f"  {key}: {why}", highlight=False, markup=False)
        return
    reasons = Counter(_without_names(why) for why in shown.values())
    example = {_without_names(why): f"{key}: {why}" for key, why in reversed(shown.items())}
    console.print(f"frozen: {len(shown)} dims (without kernel sizes), {len(reasons)} reasons")
    for reason, count in reasons.most_common():
        more = f" (and {count - 1} more like it)" if count > 1 else ""
        console.print(f"  {example[reason]}{more}", highlight=False, markup=False)


def _without_names(reason: str) -> str:
    """Remove module names and numbers, so that reasons of one kind count together."""
    return re.sub(r"\d+", "#", re.sub(r"^[\w.]+: ", "", reason))


def plugins_text() -> None:
    """Print one line per plug-in: kind, name, first line of its docstring, package."""
    registries: list[Registry[Any]] = [STRATEGIES, SEARCHERS, SCORE_MODELS, RULES]
    rows = [("kind", "name", "what it does", "package")]
    for registry in registries:
        for info in registry.infos():
            text = info.summary if info.error is None else f"broken: {info.error}"
            rows.append((info.kind, info.name, text, info.distribution))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
