"""The command line: thin functions over the library; every refusal is one line and exit code 2."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from widthkit.errors import ModelError, OptionError, WidthkitError

app = typer.Typer(
    help="Make any torchvision or timm model slimmer: trace its channel groups, train a weight-sharing supernet, "
    "search widths under a budget, export a dense network.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(
    help="Measure widthkit itself; results are JSON with versions and device.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")

# typer reads these annotations at run time, where Python 3.10 needs Optional.
Model = Annotated[str, typer.Argument(help="torchvision/NAME, timm/NAME or package.module:factory")]
Run = Annotated[Path, typer.Argument(help="Folder of a run")]
ModelOption = Annotated[
    list[str] | None, typer.Option("--model-option", help="Argument of the model's factory, as NAME=VALUE (JSON)")
]
Freeze = Annotated[list[str] | None, typer.Option(help="Module path or pattern whose output widths stay")]
Data = Annotated[str, typer.Option(help="digits, fashion-mnist, cifar10, folder:DIR or npz:FILE")]
DataDir = Annotated[str | None, typer.Option(help="Folder that holds the data set")]
ImageSize = Annotated[
    int | None, typer.Option(help="Resize images to this side length; by default their own, at least 32")
]
LimitImages = Annotated[int | None, typer.Option("--limit", help="Most images per part of the data")]
Augment = Annotated[bool, typer.Option(help="Random crops and flips while training")]
Pretrained = Annotated[bool, typer.Option(help="Start from the library's weights")]
StrategyName = Annotated[str, typer.Option("--strategy", help="Sharing strategy; see widthkit plugins")]
SearcherName = Annotated[str, typer.Option("--searcher", help="Searcher; see widthkit plugins")]
StrategyOption = Annotated[list[str] | None, typer.Option(help="Option of the strategy, as NAME=VALUE (JSON)")]
SearcherOption = Annotated[list[str] | None, typer.Option(help="Option of the searcher, as NAME=VALUE (JSON)")]
SearchImages = Annotated[int, typer.Option(min=1, help="Held-out images that every candidate is judged on, at most")]
BudgetText = Annotated[str, typer.Option("--budget", help="0.5x, 2.0GMACs, 3.1Mparams, or several with commas")]
Choices = Annotated[int, typer.Option("--k", help="Evenly spaced choices per group")]
Bins = Annotated[float | None, typer.Option(help="FLOPs-sensitive bins with this beta, instead of --k")]
MinWidth = Annotated[str, typer.Option(help="Narrowest width, as a ratio")]
MaxWidth = Annotated[str, typer.Option(help="Widest width, as a ratio; above 1x the supernet grows")]
Divisor = Annotated[int, typer.Option(help="Widths are multiples of this")]
Epochs = Annotated[int, typer.Option(help="Epochs of the supernet")]
FinalEpochs = Annotated[int, typer.Option(help="Epochs of the final trainings")]
Seeds = Annotated[int, typer.Option(help="Final trainings per network")]
Init = Annotated[str, typer.Option(help="Final trainings start from: scratch or inherit")]
BatchSize = Annotated[int, typer.Option(help="Images per step")]
Optimizer = Annotated[str, typer.Option(help="Optimiser, by timm's name")]
Lr = Annotated[float, typer.Option(help="Learning rate")]
WeightDecay = Annotated[float, typer.Option(help="Weight decay")]
Schedule = Annotated[str, typer.Option(help="Learning-rate schedule: cosine, step or constant")]
Precision = Annotated[str, typer.Option("--precision", help="no, bf16 or fp16")]
Device = Annotated[str | None, typer.Option(help="Where to run, such as cpu or cuda:0")]
Seed = Annotated[int, typer.Option(help="Seed of everything")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run")]
JsonFile = Annotated[Path | None, typer.Option("--out", help="Also write the result to this JSON file")]


@app.command("trace")
def trace_command(
    model: Model,
    input_shape: Annotated[str | None, typer.Option("--input", help="Shape of the example input: 1,3,224,224")] = None,
    freeze: Freeze = None,
    free_outputs: Annotated[bool, typer.Option(help="Let the model's outputs vary in width")] = False,
    model_option: ModelOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="List every tied tensor and every frozen dim")] = False,
) -> None:
    """Show which channels of a model belong together, and what is frozen and why."""
    from widthkit.models import create_model
    from widthkit.report.text import graph_json, graph_text
    from widthkit.trace import trace

    shape = _shape(input_shape)
    graph = trace(create_model(model, **_pairs(model_option)), shape, freeze=freeze or [], free_outputs=free_outputs)
    if as_json:
        typer.echo(json.dumps(graph_json(graph), indent=1))
    else:
        graph_text(graph, model, verbose=verbose)


@app.command("train")
def train_command(
    model: Model,
    data: Data,
    out: Out,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    limit: LimitImages = None,
    augment: Augment = False,
    pretrained: Pretrained = False,
    strategy: StrategyName = "bc",
    strategy_option: StrategyOption = None,
    k: Choices = 10,
    bins: Bins = None,
    min_width: MinWidth = "0.1x",
    max_width: MaxWidth = "1x",
    divisor: Divisor = 1,
    freeze: Freeze = None,
    epochs: Epochs = 10,
    batch_size: BatchSize = 128,
    optimizer: Optimizer = "sgd",
    lr: Lr = 0.05,
    weight_decay: WeightDecay = 1e-4,
    schedule: Schedule = "cosine",
    precision: Precision = "no",
    device: Device = None,
    seed: Seed = 0,
    model_option: ModelOption = None,
    resume: Resume = False,
) -> None:
    """Train a supernet; search and export continue in the same folder."""
    values = dict(locals())
    job = _start(values)
    net, splits = job.check(search=False)
    job.folder.begin(job.config, resume)
    job.train_supernet(net, splits)
    typer.echo(f"next: widthkit search {out} --budget 0.5x")


@app.command("search")
def search_command(
    run: Run,
    budget: BudgetText = "0.5x",
    searcher: SearcherName = "greedy",
    searcher_option: SearcherOption = None,
    search_images: SearchImages = 2048,
    resume: Resume = False,
) -> None:
    """Search widths in a trained supernet."""
    from widthkit.pipeline import Folder, Job
    from widthkit.search.run import describe

    folder = Folder(run)
    job = Job(folder.config(), folder)
    job.config.budget, job.config.searcher = budget, searcher
    job.config.searcher_options = _pairs(searcher_option)
    job.config.search_images = search_images
    net, splits = job.check()
    job.require_supernet()
    folder.fresh_search(resume)
    job.train_supernet(net, splits)
    typer.echo(describe(job.search_widths(net, splits)))
    typer.echo(f"next: widthkit export {run}")


@app.command("export")
def export_command(
    run: Run,
    widths: Annotated[Path | None, typer.Option(help="JSON file: group name -> width; the search's by default")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where to write; RUN/slim by default")] = None,
) -> None:
    """Write the slim network with the supernet's weights, its batch norms recalibrated."""
    from widthkit.pipeline import Folder, Job

    folder = Folder(run)
    job = Job(folder.config(), folder)
    chosen = _widths(widths) if widths else folder.result().widths
    job.require_supernet()
    for path in job.export_slim(chosen, out or folder.path / "slim"):
        typer.echo(path)


@app.command("slim")
def slim_command(
    model: Model,
    data: Data,
    out: Out,
    budget: BudgetText = "0.5x",
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    limit: LimitImages = None,
    augment: Augment = False,
    pretrained: Pretrained = False,
    strategy: StrategyName = "bc",
    strategy_option: StrategyOption = None,
    searcher: SearcherName = "greedy",
    searcher_option: SearcherOption = None,
    search_images: SearchImages = 2048,
    k: Choices = 10,
    bins: Bins = None,
    min_width: MinWidth = "0.1x",
    max_width: MaxWidth = "1x",
    divisor: Divisor = 1,
    freeze: Freeze = None,
    epochs: Epochs = 10,
    final_epochs: FinalEpochs = 10,
    seeds: Seeds = 1,
    init: Init = "scratch",
    batch_size: BatchSize = 128,
    optimizer: Optimizer = "sgd",
    lr: Lr = 0.05,
    weight_decay: WeightDecay = 1e-4,
    schedule: Schedule = "cosine",
    precision: Precision = "no",
    device: Device = None,
    seed: Seed = 0,
    model_option: ModelOption = None,
    resume: Resume = False,
) -> None:
    """Do all of it: train a supernet, search, export, train the result, compare with dense and uniform."""
    values = dict(locals())
    from widthkit.report.run import report_run, table_text

    job = _start(values)
    net, splits = job.check(final=True)
    job.folder.begin(job.config, resume)
    results = job.run(net, splits)
    report_run(job.folder.path)
    table_text(results)
    typer.echo(f"results in {out}: slim.safetensors, slim.json, search.json, widths.png, report.html")


@app.command("report")
def report_command(run: Run) -> None:
    """Draw the pictures and the page of a run again."""
    from widthkit.report.run import report_run

    for path in report_run(run):
        typer.echo(path)


@app.command("plugins")
def plugins_command() -> None:
    """List strategies, searchers and rules, with one line each."""
    from widthkit.report.text import plugins_text

    plugins_text()


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


def _start(values: dict[str, Any]) -> Any:
    """Build a job from a command's options."""
    from widthkit.pipeline import Folder, Job, RunConfig

    settings = {name: value for name, value in values.items() if name in RunConfig.model_fields and value is not None}
    settings["model_options"] = _pairs(values.get("model_option"))
    settings["strategy_options"] = _pairs(values.get("strategy_option"))
    settings["searcher_options"] = _pairs(values.get("searcher_option"))
    settings["mixed_precision"] = values["precision"]
    config = RunConfig(**settings)
    return Job(config, Folder(values["out"]))


def _pairs(items: list[str] | None) -> dict[str, Any]:
    """Read NAME=VALUE options; a value that is not JSON is text."""
    found = {}
    for item in items or []:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise OptionError(f"option '{item}' is not of the form NAME=VALUE")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ModelError(f"--input '{text}' is not a shape; write it like 1,3,224,224")
    return shape


def _widths(path: Path) -> dict[str, int]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(
            f"{path} cannot be read as widths ({error}); write a JSON object of group names and widths"
        ) from error
    widths = data.get("widths", data) if isinstance(data, dict) else None
    if not isinstance(widths, dict) or not all(isinstance(v, int) for v in widths.values()):
        raise OptionError(f"{path} holds no widths; write a JSON object of group names and whole numbers")
    return widths


def main() -> None:
    """Run the command line; refusals become one line on stderr and exit code 2."""
    try:
        code = app(standalone_mode=False)
        # Here, where it can still be refused: at shutdown Python would drop what a full disk did not take.
        sys.stdout.flush()
    except WidthkitError as error:
        _fail(" ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        _fail(_INTERRUPTED, 130)
    except MemoryError:
        _fail(_OUT_OF_MEMORY, 2)
    except BrokenPipeError:
        # Whoever read our output has seen enough; keep Python from complaining while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _fail(f"{error.filename or 'the system'}: {error.strerror or error}", 2)
    except Exception as error:
        if isinstance(error, RuntimeError) and ("out of memory" in str(error) or "DefaultCPUAllocator" in str(error)):
            _fail(_OUT_OF_MEMORY, 2)
        if type(error).__name__ == "Abort":
            _fail(_INTERRUPTED, 130)
        if not hasattr(error, "format_message"):
            raise
        _fail(" ".join(error.format_message().split()) + _command_hint(error), 2)
    if code == 130:
        # Typer turns Ctrl-C into this code without a word.
        _fail(_INTERRUPTED, 130)
    sys.exit(code if isinstance(code, int) else 0)


_OUT_OF_MEMORY = "out of memory; lower --batch-size or --image-size"
_INTERRUPTED = "interrupted; the same command with --resume goes on from the last checkpoint"


def _command_hint(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return f" (see {context.command_path} --help)" if context is not None else ""


def _fail(line: str, code: int) -> None:
    print(f"error: {line}" if code == 2 else line, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
