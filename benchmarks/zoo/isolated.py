"""Measure one model in a process of its own that may take so much time and memory."""

from __future__ import annotations

import multiprocessing
import time
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import psutil

from benchmarks.zoo.one import Row, measure


@dataclass(frozen=True)
class Allowance:
    """What one model may take.

    Args:
        seconds: Time on the clock; a peer has the same again.
        gigabytes: Resident memory of the process.
    """

    seconds: float = 240
    gigabytes: float = 8


def isolated(name: str, peer: str | None, allowance: Allowance) -> Row:
    """Measure one model in a forked process, and kill the process when it exceeds a limit."""
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
        failure = _excess(child.pid, time.perf_counter() - start, allowance)
    if failure is not None:
        child.kill()
    child.join()
    if failure is None and row.get("stage") != "done" and "error" not in row:
        failure = f"the process died (exit code {child.exitcode})"
    if failure is not None and row.get("stage") == "peer":
        # The peer comes last: what fails there is its failure.
        row |= {"stage": "done", "peer": row["peer"] | {"error": failure}}
    elif failure is not None:
        row["error"] = failure
    row["seconds"] = spent + time.perf_counter() - start
    return row


def _excess(pid: int | None, seconds: float, allowance: Allowance) -> str | None:
    """Say which limit a process exceeds, if it exceeds one."""
    if seconds > allowance.seconds:
        return f"took longer than {allowance.seconds:g} s"
    if _resident_gb(pid) > allowance.gigabytes:
        return f"took more than {allowance.gigabytes:g} GB"
    return None


def _receive(connection: Connection) -> Row | None:
    """Return the next message, an empty row if none comes for a moment, ``None`` at the end."""
    try:
        if connection.poll(0.2):
            found: Row = connection.recv()
            return found
    except (EOFError, OSError):
        return None
    return {}


def _resident_gb(pid: int | None) -> float:
    try:
        return float(psutil.Process(pid).memory_info().rss) / 1e9
    except psutil.Error:
        return 0.0  # the process has ended


def _child(connection: Connection, name: str, peer: str | None) -> None:
    warnings.simplefilter("ignore")
    row: Row = {"model": name}
    try:
        for row in measure(name, peer):
            connection.send(row)
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        found: dict[str, Any] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        connection.send({**row, **found, "at": f"{where.filename.rpartition('site-packages/')[2]}:{where.lineno}"})
    connection.close()
