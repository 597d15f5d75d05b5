"""The benchmark of score models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from widthkit.cli.app import bench
from widthkit.cli.options import JsonFile


@bench.command("score-model")
def bench_score_model(
    data_dir: Annotated[Path, typer.Option(help="Folder of Channel-Bench-Macro: Results_NAME.json and score files")],
    space: Annotated[str, typer.Option(help="MobileNet or ResNet")] = "MobileNet",
    scores: Annotated[
        list[Path] | None, typer.Option(help="Score files; by default all published_scores_*.json of the folder")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Draws that random figures are averaged over")] = 20,
    budget: Annotated[float, typer.Option(min=0, max=1, help="Share of the largest network's MACs")] = 0.5,
    models: Annotated[list[str] | None, typer.Option("--model", help="Score models; by default all")] = None,
    out: JsonFile = None,
) -> None:
    """Rank networks of known accuracy by supernet scores: raw, smoothed, and calibrated by 32 trainings."""
    from benchmarks.score_model import run
    from widthkit.search.score_model import SCORE_MODELS

    run(data_dir, space, scores or None, seeds, budget, models or SCORE_MODELS.names(), out)
