"""``widthkit bench``: measure your own models on your own devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from widthkit.cli.app import bench
from widthkit.cli.options import BudgetText, JsonFile, read_widths


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

    chosen = models or ["torchvision/resnet18", "torchvision/mobilenet_v2"]
    run(chosen, sizes or [64, 112], batch, repeats, device, out, keep_pages)


@bench.command("trace")
def bench_trace(
    models: Annotated[list[str] | None, typer.Option("--model", help="Models to trace")] = None,
    repeats: Annotated[int, typer.Option(help="Traces per model")] = 3,
    out: JsonFile = None,
) -> None:
    """Measure how long tracing takes."""
    from widthkit.bench.trace import DEFAULT, run

    run(models or DEFAULT, repeats, out)


@bench.command("latency")
def bench_latency(
    models: Annotated[list[str] | None, typer.Option("--model", help="Models to measure")] = None,
    budget: BudgetText = "0.5x",
    batches: Annotated[list[int] | None, typer.Option("--batch", help="Images per pass")] = None,
    modes: Annotated[list[str] | None, typer.Option("--mode", help="eager, compiled or graphs (CUDA)")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16")] = "fp32",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Channels last in memory")] = False,
    size: Annotated[int, typer.Option(help="Image size")] = 224,
    divisor: Annotated[int, typer.Option(help="Uniform widths are multiples of this; 8 for CUDA")] = 8,
    slim: Annotated[Path | None, typer.Option(help="A saved slim network to measure too")] = None,
    widths: Annotated[Path | None, typer.Option(help="JSON of searched widths to measure too")] = None,
    peer: Annotated[bool, typer.Option(help="Measure torch-pruning's uniform network too")] = True,
    repeats: Annotated[int, typer.Option(help="Timed rounds")] = 15,
    device: Annotated[str, typer.Option(help="Where to measure")] = "cpu",
    out: JsonFile = None,
) -> None:
    """Compare dense, slim and uniform networks and torch-pruning's: speed-up beside the MACs ratio."""
    from widthkit.bench.latency import Setting, run
    from widthkit.bench.networks import Comparison

    chosen = models or ["torchvision/resnet50", "torchvision/mobilenet_v2"]
    searched = read_widths(widths) if widths else None
    comparison = Comparison(budget, divisor, slim, searched, peer)
    setting = Setting(device, dtype, channels_last, size, repeats)
    run(chosen, comparison, batches or [1], modes or ["eager"], setting, out)


@bench.command("formats")
def bench_formats(
    models: Annotated[list[str] | None, typer.Option("--model", help="Models to export")] = None,
    formats: Annotated[list[str] | None, typer.Option("--format", help="safetensors, pt2, onnx, aoti")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16")] = None,
    size: Annotated[int, typer.Option(help="Image size")] = 64,
    device: Annotated[str, typer.Option(help="Where AOTInductor compiles for")] = "cpu",
    out: JsonFile = None,
) -> None:
    """Export half-width models in every format and print the largest difference."""
    from widthkit.bench.formats import DEFAULT, FORMATS, run

    run(models or list(DEFAULT), formats or list(FORMATS), dtype, size, device, out)
