"""The zoo as a Markdown table, with the bars that every model has to meet and the models that miss them."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
_SMALL = 1e8
"""Parameters below which a model must be traced in time."""
_SECONDS = 10.0


def verdict(row: Row) -> str:
    """Say in a few words how a model did.

    >>> verdict({"oracles": {"shrink": "pass", "cut": "n/a: attention"}, "stage": "done"})
    'pass'
    """
    if "error" in row:
        return f"{row.get('stage', 'start')}: {row['error']}"
    bad = failures(row)
    return "pass" if not bad else "; ".join(f"{name}: {said}" for name, said in bad.items())


def failures(row: Row) -> dict[str, str]:
    """List the oracles that do not hold; fvcore's count matters only if the other count disagrees too."""
    oracles = row.get("oracles", {})
    bad = {n: s for n, s in oracles.items() if s != "pass" and not s.startswith(("n/a", "no groups"))}
    if oracles.get("macs") == "pass":
        bad.pop("fvcore", None)
    return bad


def markdown(rows: Sequence[Row], title: str, about: Mapping[str, Any]) -> str:
    """Return the page: summary, models that miss a bar, one line per model."""
    parts = [f"# {title}: {len(rows)} models", "", _head(about), "", *_summary(rows), "", *_exceptions(rows), ""]
    columns = "model | params | trace s | groups | units | MACs searchable | oracles | frozen, most frequent | peak MB"
    with_peer = any("peer" in row for row in rows)
    parts.append(f"| {columns} |" + (" peer |" if with_peer else ""))
    parts.append("|---" * (columns.count("|") + 1 + with_peer) + "|")
    one_source = len({row["model"].partition("/")[0] for row in rows}) <= 1
    parts.extend(_line(row, with_peer, one_source) for row in rows)
    return "\n".join(parts) + "\n"


def _head(about: Mapping[str, Any]) -> str:
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    versions = ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items())
    how = "One process per model, one thread; seconds are processor time. Made by `python -m benchmarks zoo`."
    return f"{today}. {versions}. {how}"


def _summary(rows: Sequence[Row]) -> list[str]:
    passed = [r for r in rows if verdict(r) == "pass"]
    key = "trace_cpu_seconds"
    traced = sorted(r[key] for r in rows if key in r)
    lines = [f"- {len(passed)} of {len(rows)} pass every oracle that applies ({len(passed) / max(len(rows), 1):.1%})."]
    if traced:
        lines.append(f"- Trace: median {traced[len(traced) // 2]:.2f} s, slowest {traced[-1]:.2f} s.")
    both = [r for r in rows if "peer" in r and "error" not in r["peer"]]
    asked = [r for r in rows if "peer" in r]
    if asked:
        own, theirs = sum(r["peer"]["own_seconds"] for r in both), sum(r["peer"]["seconds"] for r in both)
        lines.append(
            f"- {asked[0]['peer']['peer']} halves and runs {len(both)} of {len(asked)} models that were given to both; "
            f"on these it takes {theirs:.0f} s in all, widthkit {own:.0f} s."
        )
    return lines


def _exceptions(rows: Sequence[Row]) -> list[str]:
    """Name every model that misses a bar."""
    lines = []
    for row in rows:
        said = []
        if verdict(row) != "pass":
            said.append(verdict(row))
        if row.get("params", 0) < _SMALL and row.get("trace_cpu_seconds", 0) > _SECONDS:
            said.append(f"trace takes {row['trace_cpu_seconds']:.1f} s")
        bar = 0.6 if row.get("attention") else 0.95
        if row.get("searchable_macs_share", 1) < bar:
            why = next(iter(row.get("frozen", {})), "no reason given")
            said.append(f"{row['searchable_macs_share']:.1%} of MACs searchable ({why})")
        if said:
            lines.append(f"- {row['model']}: {_plain('; '.join(said))}")
    return ["Models that miss a bar:", "", *lines] if lines else ["No model misses a bar."]


def _line(row: Row, with_peer: bool, one_source: bool) -> str:
    share = f"{row['searchable_macs_share']:.1%}" if "searchable_macs_share" in row else ""
    frozen = "; ".join(f"{n}x {why}" for why, n in list(row.get("frozen", {}).items())[:2])
    oracles = row.get("oracles", {})
    held = ", ".join(n for n, said in oracles.items() if said == "pass")
    cells = [
        row["model"].partition("/")[2] if one_source else row["model"],
        f"{row['params'] / 1e6:.1f}M" if "params" in row else "",
        f"{row['trace_cpu_seconds']:.2f}" if "trace_cpu_seconds" in row else "",
        str(row.get("groups", "")),
        str(row.get("units", "")),
        share,
        held if verdict(row) == "pass" else f"**{_plain(verdict(row))[:160]}**",
        _plain(frozen)[:200],
        f"{row['peak_memory_mb']:.0f}" if "peak_memory_mb" in row else "",
    ]
    if with_peer:
        cells.append(_peer(row.get("peer")))
    return "| " + " | ".join(cells) + " |"


def _peer(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    own = f"{found['own_seconds']:.1f} s here" if "own_seconds" in found else "not compared"
    return f"{_plain(found['error'])[:80]}; {own}" if "error" in found else f"{found['seconds']:.1f} s, {own}"


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
