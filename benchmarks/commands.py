"""The commands of ``python -m benchmarks``: options and help; the work is in the modules they import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).parent

app = typer.Typer(
    help="Verify widthkit itself; results are JSON with versions and device, beside the code.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
Out = Annotated[Path, typer.Option("--out", help="Result file; - only prints")]
DataDir = Annotated[str | None, typer.Option(help="Folder that holds the data set")]


def _file(out: Path | None) -> Path | None:
    return None if out == Path("-") else out


@app.command("cost")
def cost(
    model: Annotated[str, typer.Option(help="Model to price")] = "torchvision/resnet50",
    vectors: Annotated[int, typer.Option(help="Width vectors per evaluation")] = 10_000,
    out: Out = HERE / "cost.json",
) -> None:
    """Measure how long it takes to price many width vectors."""
    from benchmarks.cost import run

    run(model, vectors, _file(out))


@app.command("zoo")
def zoo(
    source: Annotated[str, typer.Option(help="torchvision, timm or all")] = "all",
    only: Annotated[list[str] | None, typer.Option(help="Pattern of model names, such as resnet*")] = None,
    sample: Annotated[int | None, typer.Option(help="Draw this many of these models at random")] = None,
    seed: Annotated[int, typer.Option(help="Seed of that draw")] = 0,
    peer: Annotated[str | None, typer.Option(help="Also let this library halve every model: torch-pruning")] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: every n-th model, from the i-th")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the file at --out")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that one model may take")] = 240,
    memory: Annotated[float, typer.Option(help="Gigabytes that one model may take")] = 8,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write JSON lines here, and a table beside them (.md); by default zoo/zoo-SOURCE.jsonl, or "
            "zoo/zoo-sample.jsonl with --sample; - only prints"
        ),
    ] = None,
) -> None:
    """Trace, shrink, export and check every model of a library, each in a process of its own."""
    from benchmarks.zoo.isolated import Allowance
    from benchmarks.zoo.run import Selection, run

    selection = Selection(source, only or [], shard, sample, seed)
    run(selection, peer, resume, _file(out or selection.file), Allowance(timeout, memory))


@app.command("fuzz")
def fuzz(
    examples: Annotated[int, typer.Option(min=1, help="How many random networks")] = 5_000,
    seed: Annotated[int | None, typer.Option(help="Seed of the networks; drawn and printed when not given")] = None,
    out: Out = HERE / "fuzz" / "fuzz.json",
) -> None:
    """Hold random networks against the oracles; every failure is shrunk and printed as a command."""
    from benchmarks.fuzz.run import run

    if run(examples, seed, _file(out)):
        raise typer.Exit(1)


@app.command("predict")
def predict(
    models: Annotated[list[str] | None, typer.Option("--model", help="Models to predict and measure")] = None,
    size: Annotated[int, typer.Option(help="Image size")] = 112,
    at: Annotated[str, typer.Option(help="Where: device, batch=8, fp32 or bf16, channels_last, with commas")] = "cpu",
    networks: Annotated[int, typer.Option(min=2, help="Random sub-networks per model")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the draw")] = 1,
    out: Out = HERE / "predict.json",
) -> None:
    """Compare predicted latencies of random sub-networks with measured ones."""
    import torch

    from benchmarks.predict import DEFAULT, run
    from widthkit.latency import read_conditions

    torch.set_num_threads(threads)
    conditions = read_conditions(at.split(","), f"--at {at}")
    run(models or DEFAULT, size, conditions, networks, _file(out), seed)


@app.command("strategy-memory")
def strategy_memory(
    model: Annotated[str, typer.Option(help="Model to train")] = "torchvision/resnet18",
    size: Annotated[int, typer.Option(help="Image size")] = 64,
    batch: Annotated[int, typer.Option(help="Images per step; no layer's width")] = 17,
    strategies: Annotated[list[str] | None, typer.Option("--strategy", help="Strategies; all by default")] = None,
    out: Out = HERE / "strategy-memory.json",
) -> None:
    """Count the bytes of activations that a training step of every strategy keeps for its backwards."""
    from benchmarks.strategy_memory import run

    run(model, size, batch, strategies or [], _file(out))


@app.command("learn")
def learn(
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
    records: Annotated[
        Path, typer.Option("--records", help="Folder for the records; a killed run goes on there")
    ] = Path("out/learn"),
    out: Annotated[Path, typer.Option("--out", help="Folder for the table, learn.json and learn.md")] = HERE / "learn",
) -> None:
    """Compare strategies: cost of a step, and rank correlation of supernet scores with training alone."""
    from benchmarks.learn.records import Setup
    from benchmarks.learn.run import run
    from benchmarks.nets import MODELS
    from widthkit.registry import PluginChoice
    from widthkit.supernet.strategy import STRATEGIES

    setups = [
        Setup(model, data, train_images, epochs=epochs, supernet_epochs=supernet_epochs, n_widths=widths, seeds=seeds)
        for model in models or MODELS
    ]
    choices = [PluginChoice.read(text) for text in strategies or STRATEGIES.names()]
    run(setups, choices, data_dir, records, out, part, repeats, lambda line: typer.echo(line, err=True))


@app.command("greedy")
def greedy(
    models: Annotated[list[str] | None, typer.Option("--model", help="Models to measure")] = None,
    size: Annotated[int, typer.Option(help="Image size")] = 64,
    batch: Annotated[int, typer.Option(help="Held-out images")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed rounds")] = 3,
    memory: Annotated[str, typer.Option(help="Most memory for what candidates share")] = "2GB",
    device: Annotated[str, typer.Option(help="Where to measure")] = "cpu",
    out: Out = HERE / "greedy.json",
) -> None:
    """Judge a greedy round candidate by candidate and together; compare the gain with its bound."""
    from benchmarks.greedy import DEFAULT, run

    run(models or DEFAULT, size, batch, repeats, memory, device, _file(out))


@app.command("search")
def search(
    searchers: Annotated[
        list[str] | None, typer.Option("--searcher", help="Searchers to compare with brute force")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Scores per space and budget")] = 10,
    evaluations: Annotated[int, typer.Option(min=1, help="Most networks a search may judge")] = 200,
    epochs: Annotated[int, typer.Option(min=0, help="Epochs of the supernets for first populations; 0: skip")] = 10,
    model: Annotated[str, typer.Option(help="Model of these supernets")] = "benchmarks.nets:plain_cnn",
    limit: Annotated[int | None, typer.Option(help="Most images per part of the data")] = None,
    out: Out = HERE / "search.json",
) -> None:
    """Compare searchers with brute force, first populations with random ones, and time random draws."""
    from benchmarks.search import run

    run(searchers or ["evolution", "greedy", "random"], seeds, evaluations, epochs, model, limit, _file(out))


@app.command("score-model")
def score_model(
    data_dir: Annotated[Path, typer.Option(help="Folder of Channel-Bench-Macro: Results_NAME.json and score files")],
    space: Annotated[str, typer.Option(help="MobileNet or ResNet")] = "MobileNet",
    scores: Annotated[
        list[Path] | None, typer.Option(help="Score files; by default all published_scores_*.json of the folder")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Draws that random figures are averaged over")] = 20,
    budget: Annotated[float, typer.Option(min=0, max=1, help="Share of the largest network's MACs")] = 0.5,
    models: Annotated[list[str] | None, typer.Option("--model", help="Score models; by default all")] = None,
    out: Out = HERE / "score-model.json",
) -> None:
    """Rank networks of known accuracy by supernet scores: raw, smoothed, and calibrated by 32 trainings."""
    from benchmarks.score_model import run
    from widthkit.search.score_model import SCORE_MODELS

    run(data_dir, space, scores or None, seeds, budget, models or SCORE_MODELS.names(), _file(out))


_RECOVER = {
    "model": typer.Option(help="Network, as FILE.py:factory"),
    "weights": typer.Option(help="Its trained weights"),
    "data": typer.Option(help="npz file with the images"),
    "epochs": typer.Option(min=0.1, help="Total cost of every way, in epochs of the dense network"),
    "lr": typer.Option(help="Learning rate of all trainings"),
}


@app.command("recover")
def recover(
    model: Annotated[str, _RECOVER["model"]],
    weights: Annotated[Path, _RECOVER["weights"]],
    data: Annotated[Path, _RECOVER["data"]],
    folder: Annotated[Path, typer.Option(help="Folder for checkpoints and rows; a second call goes on there")],
    way: Annotated[list[str] | None, typer.Option(help="Only this way; all by default")] = None,
    speedup: Annotated[list[float] | None, typer.Option(help="Times fewer MACs; 2.1 and 3 by default")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Rows per way")] = 3,
    epochs: Annotated[float, _RECOVER["epochs"]] = 40,
    lr: Annotated[float, _RECOVER["lr"]] = 0.05,
    jobs: Annotated[int, typer.Option(min=1, help="Rows at a time, with one thread each")] = 2,
    table_only: Annotated[bool, typer.Option("--table-only", help="Make no rows")] = False,
    out: Out = HERE / "recover" / "recover.json",
) -> None:
    """Slim a trained network in many ways at equal cost and compare what accuracy is kept."""
    from benchmarks.recover.run import run, tasks
    from benchmarks.recover.table import write_table
    from benchmarks.recover.ways import ways

    names = way or list(ways())
    wanted = [] if table_only else list(tasks(names, speedup or [2.1, 3.0], seeds))
    arguments = [f"--model={model}", f"--weights={weights}", f"--data={data}", f"--folder={folder}"]
    run(wanted, [*arguments, f"--epochs={epochs}", f"--lr={lr}"], jobs, typer.echo)
    write_table(folder, _file(out), epochs, lr, f"{Path(model).name} with {weights.name}, {data.name}")


@app.command("recover-row", hidden=True)
def recover_row(
    way: str,
    speedup: float,
    seed: int,
    model: Annotated[str, _RECOVER["model"]],
    weights: Annotated[Path, _RECOVER["weights"]],
    data: Annotated[Path, _RECOVER["data"]],
    folder: Annotated[Path, typer.Option()],
    epochs: Annotated[float, _RECOVER["epochs"]],
    lr: Annotated[float, _RECOVER["lr"]],
) -> None:
    """Make one row of the table of ``recover``."""
    from benchmarks.recover.row import Task
    from benchmarks.recover.run import one
    from benchmarks.recover.setup import Setup, final_settings

    typer.echo(one(Setup(model, weights, data, epochs, final_settings(lr)), Task(way, speedup, seed), folder))
