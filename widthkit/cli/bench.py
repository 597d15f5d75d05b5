"""Benchmarks of widthkit itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from widthkit.cli.app import bench
from widthkit.cli.options import DataDir, JsonFile


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
    from benchmarks.cost import run

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
    from benchmarks.zoo.run import run

    run(source, only or [], peer, shard, resume, out, timeout, memory)


@bench.command("fuzz")
def bench_fuzz(
    examples: Annotated[int, typer.Option(min=1, help="How many random networks")] = 5_000,
    seed: Annotated[int | None, typer.Option(help="Seed of the networks; drawn and printed when not given")] = None,
    out: JsonFile = None,
) -> None:
    """Hold random networks against the oracles; every failure is shrunk and printed as a command."""
    from benchmarks.fuzz.run import run

    if run(examples, seed, out):
        raise typer.Exit(1)


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

    from benchmarks.predict import DEFAULT, run
    from widthkit.latency import read_conditions

    torch.set_num_threads(threads)
    run(models or DEFAULT, size, read_conditions(at.split(","), f"--at {at}"), networks, out, seed)


@bench.command("strategy-memory")
def bench_strategy_memory(
    model: Annotated[str, typer.Option(help="Model to train")] = "torchvision/resnet18",
    size: Annotated[int, typer.Option(help="Image size")] = 64,
    batch: Annotated[int, typer.Option(help="Images per step; no layer's width")] = 17,
    strategies: Annotated[list[str] | None, typer.Option("--strategy", help="Strategies; all by default")] = None,
    out: JsonFile = None,
) -> None:
    """Count the bytes of activations that a training step of every strategy keeps for its backwards."""
    from benchmarks.strategy_memory import run

    run(model, size, batch, strategies or [], out)


@bench.command("learn")
def bench_learn(
    models: Annotated[
        list[str] | None, typer.Option("--model", help="small-resnet or small-mobilenetv2; both by default")
    ] = None,
    strategies: Annotated[
        list[str] | None,
        typer.Option("--strategy", help="NAME or NAME:OPTION=VALUE,...; every registered one by default"),
    ] = None,
    data_dir: DataDir = None,
    data: Annotated[str, typer.Option(help="Data set")] = "fashion-mnist",
    part: Annotated[
        str, typer.Option(help="all, dense, supernets, cost (measured anew, run it on a quiet machine) or table")
    ] = "all",
    train_images: Annotated[int, typer.Option(help="Training images")] = 8000,
    epochs: Annotated[int, typer.Option(help="Epochs of a network trained alone")] = 3,
    supernet_epochs: Annotated[int, typer.Option(help="Epochs of a supernet")] = 10,
    widths: Annotated[int, typer.Option(help="Width vectors to compare, half of them at nearly equal MACs")] = 24,
    seeds: Annotated[int, typer.Option(help="Trainings of each width vector alone")] = 2,
    repeats: Annotated[int, typer.Option(help="Timed steps")] = 30,
    out: Annotated[Path, typer.Option("--out", help="Folder for the records; a killed run goes on there")] = Path(
        "out/learn"
    ),
) -> None:
    """Compare strategies: cost of a step, and rank correlation of supernet scores with training alone."""
    from benchmarks.learn.run import Contender, Setup, run
    from benchmarks.small import MODELS
    from widthkit.supernet.strategy import STRATEGIES

    setups = [
        Setup(model, data, train_images, epochs=epochs, supernet_epochs=supernet_epochs, n_widths=widths, seeds=seeds)
        for model in models or MODELS
    ]
    run(
        setups,
        [Contender.read(text) for text in strategies or STRATEGIES.names()],
        data_dir,
        out,
        part,
        repeats,
        lambda line: typer.echo(line, err=True),
    )


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
    from benchmarks.greedy import DEFAULT, run

    run(models or DEFAULT, size, batch, repeats, memory, device, out)


@bench.command("search")
def bench_search(
    searchers: Annotated[
        list[str] | None, typer.Option("--searcher", help="Searchers to compare with brute force")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Scores per space and budget")] = 10,
    evaluations: Annotated[int, typer.Option(min=1, help="Most networks a search may judge")] = 200,
    epochs: Annotated[int, typer.Option(min=0, help="Epochs of the supernets for first populations; 0: skip")] = 10,
    model: Annotated[str, typer.Option(help="Model of these supernets")] = "benchmarks.nets:plain_cnn",
    limit: Annotated[int | None, typer.Option(help="Most images per part of the data")] = None,
    out: JsonFile = None,
) -> None:
    """Compare searchers with brute force, first populations with random ones, and time random draws."""
    from benchmarks.search import run

    run(searchers or ["evolution", "greedy", "random"], seeds, evaluations, epochs, model, limit, out)


@bench.command("lazy")
def bench_lazy(
    model: Annotated[str, typer.Option(help="small-resnet, small-mobilenetv2, or a model with width_mult")] = (
        "small-mobilenetv2"
    ),
    data: Annotated[str, typer.Option(help="Data set, as in train")] = "fashion-mnist",
    data_dir: DataDir = None,
    limit: Annotated[int, typer.Option(help="Images a supernet is trained on; the others are held out", min=1)] = 6000,
    images: Annotated[int, typer.Option(help="Held-out images of a search", min=1)] = 8192,
    seeds: Annotated[int, typer.Option(help="Supernets", min=1)] = 10,
    jobs: Annotated[int, typer.Option(help="Supernets at a time, each in a process", min=1)] = 1,
    epochs: Annotated[int, typer.Option(help="Epochs of each")] = 5,
    k: Annotated[int, typer.Option(help="Choices per group")] = 4,
    image_size: Annotated[int, typer.Option(help="Image size")] = 16,
    budget: Annotated[str, typer.Option(help="Budget of the searches")] = "0.5x",
    out: JsonFile = None,
) -> None:
    """Compare greedy's lazy rounds and races with the plain loop: work, widths, and loss on fresh images."""
    from benchmarks.lazy import run

    run(model, seeds, epochs, k, image_size, budget, data, data_dir, limit, images, jobs, out)
