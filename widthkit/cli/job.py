"""A whole run, and its steps: train, search, slim, report."""

from __future__ import annotations

from typing import Any

import typer

from widthkit.cli.app import app
from widthkit.cli.generate import with_run_options
from widthkit.cli.options import Folder, Out, Resume
from widthkit.report.run import report_run, table_text
from widthkit.run.build import build
from widthkit.run.final import finish
from widthkit.run.folder import RunFolder
from widthkit.run.given import evaluate_given
from widthkit.run.new_config import new_config
from widthkit.run.option import SEARCH, SLIM, TRAIN
from widthkit.run.steps import load_supernet, search, train_supernet
from widthkit.search.outcome import describe
from widthkit.train.parallel import process_index


@app.command(TRAIN)
@with_run_options(TRAIN)
def train_command(given: dict[str, Any], out: Out, resume: Resume = False) -> None:
    """Train a supernet; search and export continue in the same folder."""
    config = new_config(**given)
    built = build(config, RunFolder(out), search=False)
    built.folder.begin(config, TRAIN, resume)
    evaluate_given(built)
    train_supernet(built)
    typer.echo(f"next: widthkit search {out} --budget {config.budget}")


@app.command(SEARCH)
@with_run_options(SEARCH)
def search_command(given: dict[str, Any], run: Folder, resume: Resume = False) -> None:
    """Search widths in a trained supernet."""
    folder = RunFolder(run)
    folder.check_not_interrupted()
    config = folder.config().changed(given)
    folder.check_trained(config)  # here too, for building takes long
    built = build(config, folder, begins=False)
    load_supernet(built)
    result = search(built, resume=resume)
    if process_index() == 0:
        typer.echo(describe(result))
        typer.echo(f"next: widthkit export {run}")


@app.command(SLIM)
@with_run_options(SLIM)
def slim_command(given: dict[str, Any], out: Out, resume: Resume = False) -> None:
    """Do all of it: train a supernet, search, export, train the result, compare with dense and uniform."""
    config = new_config(**given)
    built = build(config, RunFolder(out), final=True)
    built.folder.begin(config, SLIM, resume)
    evaluate_given(built)
    train_supernet(built)
    results = finish(built, search(built))
    report_run(out)
    table_text(results)
    typer.echo(f"results in {out}: slim.safetensors, slim.json, search.json, accuracy.png, widths.png, report.html")


@app.command("report")
def report_command(run: Folder) -> None:
    """Draw the pictures and the page of a run again."""
    for path in report_run(run):
        typer.echo(path)
