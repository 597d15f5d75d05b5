"""Benchmarks of widthkit itself."""

from __future__ import annotations

from pathlib import Path
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


@bench.command("zoo")
def bench_zoo(
    source: Annotated[str, typer.Option(help="torchvision or timm")] = "torchvision",
    only: Annotated[list[str] | None, typer.Option(help="Pattern of model names, such as resnet*")] = None,
    peer: Annotated[str | None, typer.Option(help="Also let this library halve every model: torch-pruning")] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: every n-th model, from the i-th")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the file at --out")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that one model may take")] = 240,
    memory: Annotated[float, typer.Option(help="Gigabytes that one model may take")] = 8,
    out: Annotated[Path | None, typer.Option(help="Write JSON lines here, and a table beside them (.md)")] = None,
) -> None:
    """Trace, shrink, export and check every model of a library, each in a process of its own."""
    from widthkit.bench.zoo.run import run

    run(source, only or [], peer, shard, resume, out, timeout, memory)


@bench.command("fuzz")
def bench_fuzz(
    examples: Annotated[int, typer.Option(min=1, help="How many random networks")] = 5_000,
    seed: Annotated[int | None, typer.Option(help="Seed of the networks; drawn and printed when not given")] = None,
    out: JsonFile = None,
) -> None:
    """Hold random networks against the oracles; every failure is shrunk and printed as a command."""
    from widthkit.bench.fuzz.run import run

    if run(examples, seed, out):
        raise typer.Exit(1)
