"""The whole job and its steps: train, search, export, slim, report."""

from __future__ import annotations

from typing import Any

import typer

from widthkit.cli.app import app
from widthkit.cli.options import (
    Alpha,
    Augment,
    BatchSize,
    Bins,
    BudgetText,
    Calibrate,
    CalibrateEpochs,
    Choices,
    Data,
    DataDir,
    Device,
    Divisor,
    Epochs,
    Evaluations,
    FinalEpochs,
    Fix,
    Freeze,
    ImageSize,
    Init,
    LimitImages,
    Lr,
    MaxWidth,
    MinWidth,
    Model,
    ModelOption,
    Optimizer,
    Out,
    Precision,
    Pretrained,
    Rank,
    Resume,
    Run,
    Schedule,
    ScoreModelName,
    ScoreModelOption,
    SearcherName,
    SearcherOption,
    SearchImages,
    SearchMemory,
    Seed,
    Seeds,
    StageCount,
    StrategyName,
    StrategyOption,
    WeightDecay,
    fixed_widths,
    pairs,
)


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
    rank: Rank = None,
    strategy: StrategyName = "bc",
    strategy_option: StrategyOption = None,
    k: Choices = 10,
    bins: Bins = None,
    min_width: MinWidth = "0.1x",
    max_width: MaxWidth = "1x",
    divisor: Divisor = 1,
    fix: Fix = None,
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
    score_model: ScoreModelName = "auto",
    score_model_option: ScoreModelOption = None,
    evaluations: Evaluations = None,
    calibrate: Calibrate = 0,
    calibrate_epochs: CalibrateEpochs = 2,
    search_memory: SearchMemory = "2GB",
    stages: StageCount = 1,
    alpha: Alpha = 2.0,
    resume: Resume = False,
) -> None:
    """Search widths in a trained supernet."""
    from widthkit.run.pipeline import Folder, Job
    from widthkit.search.outcome import describe
    from widthkit.train.parallel import process_index

    folder = Folder(run)
    job = Job(folder.config(), folder)
    job.config.budget, job.config.searcher = budget, searcher
    job.config.searcher_options = pairs(searcher_option)
    job.config.score_model, job.config.score_model_options = score_model, pairs(score_model_option)
    job.config.evaluations, job.config.calibrate = evaluations, calibrate
    job.config.calibrate_epochs = calibrate_epochs
    job.config.search_images, job.config.search_memory = search_images, search_memory
    job.config.stages, job.config.alpha = stages, alpha
    net, splits = job.check()
    job.require_supernet()
    folder.fresh_search(resume)
    job.train_supernet(net, splits)
    result = job.search_widths(net, splits)
    if process_index() == 0:
        typer.echo(describe(result))
        typer.echo(f"next: widthkit export {run}")


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
    rank: Rank = None,
    strategy: StrategyName = "bc",
    strategy_option: StrategyOption = None,
    searcher: SearcherName = "greedy",
    searcher_option: SearcherOption = None,
    search_images: SearchImages = 2048,
    score_model: ScoreModelName = "auto",
    score_model_option: ScoreModelOption = None,
    evaluations: Evaluations = None,
    calibrate: Calibrate = 0,
    calibrate_epochs: CalibrateEpochs = 2,
    search_memory: SearchMemory = "2GB",
    k: Choices = 10,
    bins: Bins = None,
    min_width: MinWidth = "0.1x",
    max_width: MaxWidth = "1x",
    divisor: Divisor = 1,
    fix: Fix = None,
    freeze: Freeze = None,
    stages: StageCount = 1,
    alpha: Alpha = 2.0,
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

    if stages > 1 and bins is None:
        from widthkit.run.stages import first_beta

        values["bins"] = first_beta(alpha, stages)  # the last stage then has bins with beta 1
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


def _start(values: dict[str, Any]) -> Any:
    """Build a job from a command's options."""
    from widthkit.run.pipeline import Folder, Job, RunConfig

    settings = {name: value for name, value in values.items() if name in RunConfig.model_fields and value is not None}
    settings["model_options"] = pairs(values.get("model_option"))
    settings["strategy_options"] = pairs(values.get("strategy_option"))
    settings["searcher_options"] = pairs(values.get("searcher_option"))
    settings["score_model_options"] = pairs(values.get("score_model_option"))
    settings["mixed_precision"] = values["precision"]
    settings["fixed"] = fixed_widths(values.get("fix"))
    config = RunConfig(**settings)
    return Job(config, Folder(values["out"]))
