"""Go through the zoo: one process a model, forked from a parent that has imported everything."""

from __future__ import annotations

import json
import multiprocessing
import time
import traceback
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.zoo.names import model_names
from benchmarks.zoo.one import Row, measure
from benchmarks.zoo.table import markdown, verdict
from widthkit.bench.files import machine
from widthkit.errors import OptionError
from widthkit.files import atomic_write
from widthkit.version import versions


def run(
    source: str,
    only: Sequence[str],
    peer: str | None,
    shard: str | None,
    resume: bool,
    out: Path | None,
    timeout: float,
    memory_gb: float,
) -> None:
    """Measure every chosen model, write JSON lines as they come and a Markdown table at the end."""
    names = model_names(source, only, shard)
    rows = _earlier(out) if resume else []
    if out is not None and out.exists() and not resume:
        raise OptionError(f"{out} exists; --resume goes on with it, or name another file")
    done = {row["model"] for row in rows}
    todo = [name for name in names if name not in done]
    console = Console()
    _warm_up(peer)
    for number, name in enumerate(todo, start=1):
        row = isolated(name, peer, timeout, memory_gb)
        rows.append(row)
        if out is not None:
            _append(out, row)
        share = f"{row['searchable_macs_share']:.1%}" if "searchable_macs_share" in row else "-"
        times = f"trace {row.get('trace_cpu_seconds', 0):.2f} s, all {row['seconds']:.1f} s"
        line = f"{number}/{len(todo)} {name}: {verdict(row)}, {share} searchable, {times}"
        console.print(line, highlight=False, markup=False)
    if out is not None:
        about = {"versions": versions(), "machine": machine()}
        atomic_write(out.with_suffix(".md"), markdown(rows, source, about).encode())
    else:
        console.print(markdown(rows, source, {}), highlight=False, markup=False)


def _warm_up(peer: str | None) -> None:
    """Import what every model needs before the first fork; a thread pool would not survive it."""
    torch.set_num_threads(1)
    import fvcore.nn
    import timm
    import torchvision.models

    if peer is not None:
        import torch_pruning  # noqa: F401
    assert fvcore.nn
    assert timm
    assert torchvision.models


def _earlier(out: Path | None) -> list[Row]:
    if out is None:
        raise OptionError("--resume needs --out, the file to go on with")
    if not out.exists():
        return []
    lines = out.read_text(encoding="utf-8").splitlines()
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            # The last line of a run that was killed while writing; its model is measured again.
            continue
    return rows


def _append(out: Path, row: Row) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    torn = out.exists() and out.read_bytes()[-1:] not in (b"\n", b"")
    with out.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(row) + "\n")


def isolated(name: str, peer: str | None, timeout: float, memory_gb: float) -> Row:
    """Measure one model in a process of its own, which is killed when it takes too long or too much."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, name, peer), daemon=True)
    start = time.perf_counter()
    child.start()
    theirs.close()
    row: Row = {"model": name}
    failure, spent = None, 0.0
    while failure is None:
        update = _receive(ours)
        if update is None:
            break
        if update and update["stage"] == "peer":
            # widthkit is through; the peer has a time of its own.
            start, spent = time.perf_counter(), time.perf_counter() - start
        row = update or row
        if time.perf_counter() - start > timeout:
            failure = f"took longer than {timeout:g} s"
        elif _resident_gb(child.pid) > memory_gb:
            failure = f"took more than {memory_gb:g} GB"
    if failure is not None:
        child.kill()
    child.join()
    if failure is None and row.get("stage") != "done" and "error" not in row:
        failure = f"the process died (exit code {child.exitcode})"
    if failure is not None and row.get("stage") == "peer":
        # The peer comes last: what it breaks is its own.
        row |= {"stage": "done", "peer": row["peer"] | {"error": failure}}
    elif failure is not None:
        row["error"] = failure
    row["seconds"] = spent + time.perf_counter() - start
    return row


def _receive(connection: Connection) -> Row | None:
    """Return the next message, an empty row when none came for a moment, ``None`` at the end."""
    try:
        if connection.poll(0.2):
            found: Row = connection.recv()
            return found
    except (EOFError, OSError):
        return None
    return {}


def _resident_gb(pid: int | None) -> float:
    import psutil

    try:
        return float(psutil.Process(pid).memory_info().rss) / 1e9
    except psutil.Error:
        return 0.0


def _child(connection: Connection, name: str, peer: str | None) -> None:
    warnings.simplefilter("ignore")
    row: Row = {"model": name}
    try:
        for row in measure(name, peer):
            connection.send(row)
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        said: dict[str, Any] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        connection.send({**row, **said, "at": f"{where.filename.rpartition('site-packages/')[2]}:{where.lineno}"})
    connection.close()
