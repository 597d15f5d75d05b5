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


@bench.command("greedy")
def bench_greedy(
    models: Annotated[list[str] | None, typer.Option("--model", help="Models to measure")] = None,
    size: Annotated[int, typer.Option(help="Image size")] = 64,
    batch: Annotated[int, typer.Option(help="Held-out images")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed rounds")] = 3,
    memory: Annotated[str, typer.Option(help="Most memory for what candidates share")] = "2GB",
    device: Annotated[str, typer.Option(help="Where to measure")] = "cpu",
    out: JsonFile = None,
) -> None:
    """Judge a greedy round candidate by candidate and together; compare the gain with its bound."""
    from widthkit.bench.greedy import DEFAULT, run

    run(models or DEFAULT, size, batch, repeats, memory, device, out)


@bench.command("lazy")
def bench_lazy(
    model: Annotated[str, typer.Option(help="Model to train thinly on digits; takes width_mult")] = (
        "torchvision/mobilenet_v2"
    ),
    seeds: Annotated[int, typer.Option(help="Supernets")] = 10,
    epochs: Annotated[int, typer.Option(help="Epochs of each")] = 3,
    k: Annotated[int, typer.Option(help="Choices per group")] = 4,
    image_size: Annotated[int, typer.Option(help="Image size")] = 16,
    budget: Annotated[str, typer.Option(help="Budget of the searches")] = "0.6x",
    out: JsonFile = None,
) -> None:
    """Compare greedy's lazy rounds and races with the plain loop: work, and whether the final widths are the same."""
    from widthkit.bench.lazy import run

    run(model, seeds, epochs, k, image_size, budget, out)
