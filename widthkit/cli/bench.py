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


@bench.command("predict")
def bench_predict(
    models: Annotated[list[str] | None, typer.Option("--model", help="Models to predict and measure")] = None,
    size: Annotated[int, typer.Option(help="Image size")] = 112,
    at: Annotated[str, typer.Option(help="Where: device, batch=8, fp32 or bf16, channels_last, with commas")] = "cpu",
    networks: Annotated[int, typer.Option(min=2, help="Random sub-networks per model")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the draw")] = 1,
    out: JsonFile = None,
) -> None:
    """Compare predicted latencies of random sub-networks with measured ones."""
    import torch

    from widthkit.bench.predict import DEFAULT, run
    from widthkit.latency import read_conditions

    torch.set_num_threads(threads)
    run(models or DEFAULT, size, read_conditions(at.split(","), f"--at {at}"), networks, out, seed)
