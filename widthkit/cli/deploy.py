"""Benchmarks of what was exported: latency, and the formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from widthkit.cli.app import bench
from widthkit.cli.options import BudgetText, JsonFile, read_widths


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

    setting = Setting(device, dtype, channels_last, size, repeats)
    known = read_widths(widths) if widths else None
    chosen = models or ["torchvision/resnet50", "torchvision/mobilenet_v2"]
    run(chosen, budget, batches or [1], modes or ["eager"], setting, divisor, out, slim=slim, widths=known, peer=peer)


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
