"""Pictures and a page of one run, made from its JSON files alone."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from widthkit.budget import show_count
from widthkit.errors import CheckpointError
from widthkit.files import atomic_write
from widthkit.latency.slow_layers import ENOUGH, SlowLayer, describe, is_slow
from widthkit.report.pictures import draw_accuracy, draw_search, draw_widths
from widthkit.search import SearchResult
from widthkit.search.measured import describe_rows


class _Row(BaseModel):
    network: str
    macs: int
    params: int
    accuracy: list[float]
    accuracy_mean: float
    accuracy_std: float | None
    latency_ms: float
    slow_layers: list[SlowLayer] = []


class _Latency(BaseModel):
    input_shape: list[int]
    device: str


class _Results(BaseModel):
    """What the page needs of ``results.json``."""

    config: dict[str, Any]
    versions: dict[str, Any]
    latency: _Latency
    table: list[_Row]
    widths: dict[str, dict[str, int]]
    measured: list[dict[str, Any]] = []
    notes: list[str] = []


def report_run(folder: str | Path) -> list[Path]:
    """Draw ``accuracy.png`` (of a finished run), ``widths.png``, ``search.png`` and ``report.html``.

    Args:
        folder: A run's folder with ``search.json``; ``results.json`` adds the table.

    Returns:
        The files that were written.

    Raises:
        CheckpointError: If the folder holds no search result.
    """
    root = Path(folder)
    result = SearchResult.load(root / "search.json") if (root / "search.json").exists() else None
    if result is None:
        raise CheckpointError(f"{root} holds no search result (no search.json); run widthkit search or slim first")
    results = _results(root / "results.json")
    widths = results["widths"] if results else {"searched": result.widths}
    pictures = {"accuracy.png": draw_accuracy(results["table"])} if results else {}
    pictures |= {"widths.png": draw_widths(result, widths), "search.png": draw_search(result)}
    written = []
    for name, data in pictures.items():
        atomic_write(root / name, data)
        written.append(root / name)
    page = _page(result, results, pictures)
    atomic_write(root / "report.html", page.encode())
    return [*written, root / "report.html"]


def _results(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        checked = _Results.model_validate(data)
        if not {"dense", "uniform", "searched"} <= {row.network for row in checked.table}:
            raise ValueError("the table must hold dense, uniform and searched")
        return data
    except (OSError, ValueError, TypeError) as error:
        why = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path} is damaged ({why}); run the command again") from error


COLUMNS = ("network", "MACs", "of dense", "params", "accuracy", "latency", "speed-up")


def table_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the cells of the comparison, one row per network."""
    dense = results["table"][0]
    rows: list[tuple[str, ...]] = []
    for row in results["table"]:
        spread = "" if row["accuracy_std"] is None else f" ± {100 * row['accuracy_std']:.2f}"
        rows.append(
            (
                row["network"],
                show_count(row["macs"]),
                f"{row['macs'] / dense['macs']:.3f}x",
                show_count(row["params"]),
                f"{100 * row['accuracy_mean']:.2f}{spread} %",
                f"{row['latency_ms']:.2f} ms",
                f"{dense['latency_ms'] / row['latency_ms']:.2f}x",
            )
        )
    return rows


def remarks(results: dict[str, Any]) -> list[str]:
    """List what is disappointing about the outcome, in words."""
    rows = {row["network"]: row for row in results["table"]}
    dense, uniform, searched = rows["dense"], rows["uniform"], rows["searched"]
    found = list(results.get("notes", []))
    if searched["latency_ms"] >= dense["latency_ms"]:
        found.append("the searched network is not faster than the dense one on this device")
    for row in (uniform, searched):
        if is_slow(dense["latency_ms"], row["latency_ms"], dense["macs"], row["macs"]):
            layers = [SlowLayer(**layer) for layer in row.get("slow_layers", [])]
            why = f"; most time beyond their work: {describe(layers)}" if layers else ""
            found.append(
                f"the speed-up of the {row['network']} network is below {ENOUGH} of the MACs ratio on this device{why}"
            )
    if searched["accuracy_mean"] < uniform["accuracy_mean"]:
        found.append("the uniformly shrunk network is more accurate than the searched one")
    spread = max(r["accuracy_std"] or 0.0 for r in (uniform, searched))
    if abs(searched["accuracy_mean"] - uniform["accuracy_mean"]) <= spread:
        found.append("searched and uniform differ by less than the spread over seeds")
    return found


def _caption(results: dict[str, Any]) -> str:
    n = max(len(row["accuracy"]) for row in results["table"])
    shape = "x".join(str(s) for s in results["latency"]["input_shape"])
    return (
        f"accuracy: mean ± standard deviation over {n} final training{'s' if n > 1 else ''}; "
        f"latency: median forward pass, input {shape}, {results['latency']['device']}, measured in turns"
        + "".join(f"; {phrase}" for phrase in describe_rows(results.get("measured", [])))
    )


def table_text(results: dict[str, Any]) -> None:
    """Print the comparison as a table."""
    console = Console()
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in table_rows(results):
        table.add_row(*row)
    console.print(table, highlight=False)
    console.print(_caption(results), highlight=False)
    for remark in remarks(results):
        console.print(f"note: {remark}", highlight=False)


def _page(result: SearchResult, results: dict[str, Any] | None, pictures: dict[str, bytes]) -> str:
    """Return one self-contained HTML page."""
    body = [f"<h1>widthkit: {html.escape(results['config']['model'] if results else 'search')}</h1>"]
    if results:
        head = "".join(f"<th>{c}</th>" for c in COLUMNS)
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in r) + "</tr>" for r in table_rows(results))
        body.append(f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")
        body.append(f"<p>{html.escape(_caption(results))}</p>")
        body += [f"<p class=note>Note: {html.escape(r)}.</p>" for r in remarks(results)]
    for name, data in pictures.items():
        encoded = base64.b64encode(data).decode()
        body.append(f'<img alt="{name}" src="data:image/png;base64,{encoded}">')
    full = result.full["widths"]
    rows = "".join(
        f"<tr><td>{html.escape(n)}</td><td>{w}</td><td>{result.widths.get(n, w)}</td></tr>" for n, w in full.items()
    )
    body.append(
        f"<h2>Widths</h2><table><thead><tr><th>group</th><th>dense</th><th>searched</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )
    if results:
        shown = json.dumps(
            {"config": results["config"], "recipe": results["recipe"], "versions": results["versions"]}, indent=1
        )
        body.append(f"<h2>Settings</h2><pre>{html.escape(shown)}</pre>")
    return _TEMPLATE.replace("BODY", "\n".join(body))


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>widthkit report</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #e4e7eb; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; display: block; margin: 1rem 0; }
pre { background: #f5f7fa; padding: 1rem; overflow-x: auto; }
.note { color: #b44d12; }
</style></head><body>
BODY
</body></html>
"""
