"""Go through the zoo: one process per model, forked from a parent that has imported everything."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.zoo.isolated import Allowance, isolated
from benchmarks.zoo.names import ALL, model_names
from benchmarks.zoo.one import Row
from benchmarks.zoo.table import markdown, verdict
from widthkit.bench.files import machine
from widthkit.errors import OptionError
from widthkit.files import atomic_write
from widthkit.version import versions


@dataclass(frozen=True)
class Selection:
    """Which models are measured; see :func:`~benchmarks.zoo.names.model_names`."""

    source: str = ALL
    only: list[str] = field(default_factory=list)
    shard: str | None = None
    sample: int | None = None
    seed: int = 0

    def names(self) -> list[str]:
        """List the models."""
        return model_names(self.source, self.only, self.shard, self.sample, self.seed)

    @property
    def title(self) -> str:
        """The heading of the table."""
        return self.source if self.sample is None else f"{self.source}, {self.sample} drawn with seed {self.seed}"

    @property
    def file(self) -> Path:
        """The result file beside this code."""
        return Path(__file__).parent / f"zoo-{self.source if self.sample is None else 'sample'}.jsonl"


def run(selection: Selection, peer: str | None, resume: bool, out: Path | None, allowance: Allowance) -> None:
    """Measure every selected model, write JSON lines as they come and a Markdown table at the end.

    Args:
        selection: The models.
        peer: Also let this library halve every model.
        resume: Go on with the file at ``out``.
        out: File of JSON lines; the table is written beside it.
        allowance: What one model may take.

    Raises:
        OptionError: If the selection makes no sense, or the file exists and ``resume`` is not set.
    """
    names = selection.names()
    rows = _earlier(out) if resume else []
    if out is not None and out.exists() and not resume:
        raise OptionError(f"{out} exists; --resume goes on with it, or name another file")
    done = {row["model"] for row in rows}
    todo = [name for name in names if name not in done]
    console = Console()
    _import_everything(peer)
    for number, name in enumerate(todo, start=1):
        row = isolated(name, peer, allowance)
        rows.append(row)
        if out is not None:
            _append(out, row)
        share = f"{row['searchable_macs_share']:.1%}" if "searchable_macs_share" in row else "-"
        times = f"trace {row.get('trace_cpu_seconds', 0):.2f} s, all {row['seconds']:.1f} s"
        line = f"{number}/{len(todo)} {name}: {verdict(row)}, {share} searchable, {times}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    about: dict[str, Any] = {} if out is None else {"versions": versions(), "machine": machine()}
    page = markdown(rows, selection.title, about)
    if out is not None:
        atomic_write(out.with_suffix(".md"), page.encode())
    else:
        console.print(page, highlight=False, markup=False)


def _import_everything(peer: str | None) -> None:
    """Import what every model needs before the first fork; a thread pool would not survive the fork."""
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
    rows = []
    for line in out.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            # The last line of a run that was killed while it wrote; its model is measured again.
            continue
    return rows


def _append(out: Path, row: Row) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    torn = out.exists() and out.read_bytes()[-1:] not in (b"\n", b"")
    with out.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(row) + "\n")
