"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from widthkit.errors import ModelError, OptionError

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
Rank = Annotated[
    str | None,
    typer.Option(
        help="Order units by importance before sharing, for pretrained models: magnitude, bn-scale, lamp, fpgm, taylor "
        "or hessian"
    ),
]
StrategyName = Annotated[str, typer.Option("--strategy", help="Sharing strategy; see widthkit plugins")]
SearcherName = Annotated[str, typer.Option("--searcher", help="Searcher; see widthkit plugins")]
StrategyOption = Annotated[list[str] | None, typer.Option(help="Option of the strategy, as NAME=VALUE (JSON)")]
SearcherOption = Annotated[list[str] | None, typer.Option(help="Option of the searcher, as NAME=VALUE (JSON)")]
SearchImages = Annotated[int, typer.Option(min=1, help="Held-out images that every candidate is judged on, at most")]
ScoreModelName = Annotated[
    str, typer.Option("--score-model", help="Smooths the supernet's scores: auto, none or a name; see widthkit plugins")
]
ScoreModelOption = Annotated[list[str] | None, typer.Option(help="Option of the score model, as NAME=VALUE (JSON)")]
Evaluations = Annotated[
    int | None,
    typer.Option(min=2, help="Networks that the supernet judges for a score model"),
]
Calibrate = Annotated[int, typer.Option(min=0, help="Stand-alone trainings, chosen by design, that correct the scores")]
CalibrateEpochs = Annotated[int, typer.Option(min=1, help="Epochs of each of them")]
SearchMemory = Annotated[str, typer.Option(help="Most memory for what candidates that are judged together share")]
BudgetText = Annotated[
    str,
    typer.Option(
        "--budget",
        help="0.5x, 2.0GMACs, 3.1Mparams, memory like 12MB or 12MB@batch=16,bf16, latency like "
        "1.8ms@cuda:0,batch=8,channels_last; several with commas",
    ),
]
Choices = Annotated[int, typer.Option("--k", help="Evenly spaced choices per group")]
Bins = Annotated[
    float | None, typer.Option(help="FLOPs-sensitive bins with this beta, instead of --k (the first stage's)")
]
MinWidth = Annotated[str, typer.Option(help="Narrowest width, as a ratio")]
MaxWidth = Annotated[str, typer.Option(help="Widest width, as a ratio; above 1x the supernet grows")]
Divisor = Annotated[int, typer.Option(help="Widths are multiples of this")]
Fix = Annotated[list[str] | None, typer.Option("--fix", help="Keep a channel group at one width, as GROUP=WIDTH")]
StageCount = Annotated[
    int, typer.Option("--stages", min=1, help="Search in so many stages; bins get finer, each starts from the last")
]
Alpha = Annotated[float, typer.Option(help="With --stages: bins get finer by this factor from stage to stage")]
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


def pairs(items: list[str] | None) -> dict[str, Any]:
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


def fixed_widths(items: list[str] | None) -> dict[str, int]:
    """Read GROUP=WIDTH options."""
    found = {}
    for item in items or []:
        name, _, text = item.rpartition("=")
        if not name or not text.strip().isdecimal():
            raise OptionError(f"--fix '{item}' is not of the form GROUP=WIDTH; widthkit space lists the groups")
        found[name] = int(text)
    return found


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """Read an input shape such as 1,3,224,224."""
    if text is None:
        return None
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ModelError(f"--input '{text}' is not a shape; write it like 1,3,224,224")
    return shape


def read_widths(path: Path) -> dict[str, int]:
    """Read a JSON file of widths: group name -> width, alone or under ``widths``."""
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
