"""Benchmarks of widthkit itself."""

from __future__ import annotations

from typing import Annotated

import typer

from widthkit.cli.app import bench
from widthkit.cli.options import JsonFile


@bench.command("step")
def bench_step(
    models: Annotated[list[str] | None, typer.Option("--model", help="Models to measure")] = None,
    sizes: Annotated[list[int] | None, typer.Option("--size", help="Image sizes")] = None,
    batch: Annotated[int, typer.Option(help="Images per step")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed rounds")] = 15,
    device: Annotated[str, typer.Option(help="Where to measure")] = "cpu",
    keep_pages: Annotated[bool, typer.Option(help="Let the C library keep freed memory; page faults are noise")] = True,
    out: JsonFile = None,
) -> None:
    """Compare a supernet's step at half width with the dense network's: forward and backward."""
    from widthkit.bench.step import run

    run(
        models or ["torchvision/resnet18", "torchvision/mobilenet_v2"],
        sizes or [64, 112],
        batch,
        repeats,
        device,
        out,
        keep_pages,
    )


@bench.command("trace")
def bench_trace(
    models: Annotated[list[str] | None, typer.Option("--model", help="Models to trace")] = None,
    repeats: Annotated[int, typer.Option(help="Traces per model")] = 3,
    out: JsonFile = None,
) -> None:
    """Measure how long tracing takes."""
    from widthkit.bench.trace import DEFAULT, run

    run(models or DEFAULT, repeats, out)


@bench.command("cost")
def bench_cost(
    model: Annotated[str, typer.Option(help="Model to price")] = "torchvision/resnet50",
    vectors: Annotated[int, typer.Option(help="Width vectors per evaluation")] = 10_000,
    out: JsonFile = None,
) -> None:
    """Measure how long it takes to price many width vectors."""
    from widthkit.bench.cost import run

    run(model, vectors, out)


@bench.command("search")
def bench_search(
    searchers: Annotated[
        list[str] | None, typer.Option("--searcher", help="Searchers to compare with brute force")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Scores per space and budget")] = 10,
    evaluations: Annotated[int, typer.Option(min=1, help="Most networks a search may judge")] = 200,
    epochs: Annotated[int, typer.Option(min=0, help="Epochs of the supernets for first populations; 0: skip")] = 10,
    model: Annotated[str, typer.Option(help="Model of these supernets")] = "widthkit.bench.nets:plain_cnn",
    limit: Annotated[int | None, typer.Option(help="Most images per part of the data")] = None,
    out: JsonFile = None,
) -> None:
    """Compare searchers with brute force, first populations with random ones, and time random draws."""
    from widthkit.bench.search import run

    run(searchers or ["evolution", "greedy", "random"], seeds, evaluations, epochs, model, limit, out)
