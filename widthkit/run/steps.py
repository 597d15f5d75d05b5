"""The steps of a run: train the supernet, load it, search widths, export what was found.

Every step takes up what an interrupted run left in the folder. :func:`widthkit.run.build.build` comes first,
:func:`widthkit.run.final.finish` last.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from widthkit.budget import Budget
from widthkit.export import check_same, export, save
from widthkit.graph import Kept
from widthkit.graph.plan import kept_units
from widthkit.run.build import Built, training_data
from widthkit.run.dense import plain_model
from widthkit.run.recipe import TrainingRecipe
from widthkit.run.stages import next_supernet, run_stages
from widthkit.search import Judging, SearchResult
from widthkit.search import search as search_widths
from widthkit.search.measured import describe_rows
from widthkit.supernet import Supernet
from widthkit.train import TrainResult, evaluate, make_loader, recalibrate, train

JUDGED_TOGETHER = 512
"""Images per batch where nothing is trained."""


def train_supernet(built: Built, net: Supernet | None = None, stage: int = 1) -> None:
    """Train a supernet, or go on where its training was interrupted.

    Args:
        built: What the run works with.
        net: The supernet of a later stage; the first one by default.
        stage: Its stage.
    """
    net = net or built.net
    options = str(net.strategy).removeprefix(type(net.strategy).__name__)
    size = f"{len(net.space.groups)} groups, {net.space.size:.3g} width vectors"
    built.say(f"supernet: {built.config.strategy}{options}, {size}")
    result = train_by(built, built.recipe.supernet, net, built.folder.supernet(stage))
    trained = "not trained" if result is None else f"trained {result.epochs} epochs, loss {result.loss:.4f}"
    built.say(f"supernet: {trained}")


def load_supernet(built: Built, net: Supernet | None = None, stage: int = 1) -> None:
    """Load the weights of a supernet that was trained before; nothing is trained.

    Args:
        built: What the run works with.
        net: The supernet of a later stage; the first one by default.
        stage: Its stage.

    Raises:
        CheckpointError: If there is none, or if its training was interrupted; the line says how to finish it.
    """
    built.folder.check_trained(built.config, stage)
    # Training that is complete returns at once, with the stored weights.
    train_by(built, built.recipe.supernet, net or built.net, built.folder.supernet(stage), progress=False)


def search(built: Built, *, resume: bool = True) -> SearchResult:
    """Search widths in a trained supernet, or go on; later stages train their supernets on the way.

    Args:
        built: What the run works with.
        resume: Go on with an interrupted search.

    Raises:
        OptionError: If the folder holds a search already and ``resume`` is false, or if it had other options.
    """
    built.folder.begin_search(built.config, resume)
    if built.config.stages == 1:
        return _search_stage(built, built.net, built.budget, built.folder.path)

    def train_stage(net: Supernet, stage: int) -> None:
        if stage > 1:
            train_supernet(built, net, stage)

    def search_stage(net: Supernet, budget: Budget, stage: int) -> SearchResult:
        return _search_stage(built, net, budget, built.folder.stage(stage, built.config))

    result = run_stages(built.net, built.stage_plan, train_stage, search_stage, built.rank).result
    result.save(built.folder.result_file)
    return result


def supernet_of(built: Built, widths: Mapping[str, int]) -> Supernet:
    """Return the trained supernet whose weights these widths take: the last stage's for what its search found.

    Args:
        built: What the run works with; its first supernet is trained.
        widths: Group name -> width.
    """
    file = built.folder.result_file
    if built.config.stages == 1 or not file.exists():
        return built.net
    result = SearchResult.load(file)
    if result.widths != dict(widths):
        return built.net
    net, plan = built.net, built.stage_plan
    for before, row in itertools.pairwise(result.settings["stages"]):
        net = next_supernet(net, before["widths"], plan, row["stage"], built.net, built.rank)
        load_supernet(built, net, row["stage"])
    return net


def kept_by(built: Built, widths: Mapping[str, int]) -> Kept:
    """Return the supernet's units for widths: those that the search judged best, if these widths are what it found.

    Other widths come back as they are; they stand for the units of the strategy's first path.

    Args:
        built: What the run works with.
        widths: Group name -> width.
    """
    file = built.folder.result_file
    result = SearchResult.load(file) if file.exists() else None
    return result.units if result is not None and result.units and result.widths == dict(widths) else widths


def supernet_at(built: Built, widths: Mapping[str, int]) -> Supernet:
    """Return the trained supernet with the sub-network of given widths active; :func:`export` makes its network.

    Args:
        built: What the run works with; its first supernet is trained.
        widths: Group name -> width.
    """
    net = supernet_of(built, widths).set_widths(kept_by(built, widths))
    if net.merges:
        # Merging turns running statistics into weights, so they must be these widths' own.
        recalibrate(net, make_loader(built.data.train, built.recipe.supernet.batch_size, train=False))
    return net


def export_widths(
    built: Built, widths: dict[str, int], path: Path, formats: Sequence[str] = ("safetensors",), **form: Any
) -> tuple[Path, ...]:
    """Write the network of given widths with the supernet's weights, its batch norms recalibrated.

    Args:
        built: What the run works with; its supernet is trained.
        widths: Group name -> width.
        path: Where to write.
        formats: As in :func:`widthkit.save`.
        **form: ``dtype``, ``channels_last``, ``fold_bn`` and ``device``, as there.

    Raises:
        ExportError: If the network computes something else than the supernet at these widths, or a file something
            else than the network; nothing is written then.
    """
    kept_units(built.net.graph, widths)
    net = supernet_at(built, widths)
    slim = export(net)
    images = torch.stack([built.data.valid[i][0] for i in range(2)])
    # Before recalibration: the supernet's statistics are still the slim network's.
    same = check_same(net, slim, images, name="the slim network")
    built.say(f"slim: largest difference from the supernet {same.largest_difference:.2g}")
    recalibrate(slim, make_loader(built.data.train, built.recipe.supernet.batch_size, train=False))
    return save(
        slim.cpu(),
        path,
        formats=formats,
        model=built.config.model,
        kwargs=built.factory_options,
        example_inputs=images,
        say=built.say,
        **form,
    )


def train_by(
    built: Built,
    how: TrainingRecipe,
    net: nn.Module,
    out: Path,
    *,
    seed: int | None = None,
    progress: bool | None = None,
    teacher: nn.Module | None = None,
) -> TrainResult | None:
    """Train a network as a recipe says, or go on.

    Args:
        built: What the run works with.
        how: The recipe; with 0 epochs the network stays as it is.
        net: The network.
        out: Where its checkpoint goes.
        seed: Seeds the training and the order of the data; the run's by default.
        progress: Show a progress bar; as the run does by default.
        teacher: A trained network to learn from as well.
    """
    if how.epochs == 0:
        return None
    seed = built.config.seed if seed is None else seed
    return train(
        net,
        training_data(built.data, how, seed),
        how.epochs,
        seed=seed,
        device=built.config.device,
        out=out,
        resume=True,
        progress=built.progress if progress is None else progress,
        teacher=teacher,
        checkpoint_minutes=built.config.checkpoint_minutes,
        trackers=built.config.trackers,
        **how.keywords(),
    )


def train_alone(built: Built, widths: Mapping[str, int]) -> float:
    """Train a network of given widths briefly from fresh weights, or go on; return its held-out accuracy.

    Args:
        built: What the run works with.
        widths: Group name -> width.
    """
    c, graph = built.config, built.net.graph
    slim = export(plain_model(c, built.data, c.seed), dict(widths), graph=graph)
    name = hashlib.sha256(json.dumps(dict(widths), sort_keys=True).encode()).hexdigest()[:16]
    out = built.folder.path / "stand-alone" / name
    train_by(built, built.recipe.calibration, slim, out, progress=False)
    recalibrate(slim, make_loader(built.data.train, built.recipe.calibration.batch_size, train=False))
    found = evaluate(slim, make_loader(built.data.valid, JUDGED_TOGETHER, train=False), device=c.device)
    share = graph.macs(widths) / graph.macs()
    built.say(f"stand-alone training: {share:.1%} of the MACs, accuracy {found['accuracy']:.2%}")
    return float(found["accuracy"])


def _search_stage(built: Built, net: Supernet, budget: Budget, folder: Path) -> SearchResult:
    c = built.config
    # The parts of the data interleave their classes, so the first images are a fair sample.
    count = min(c.search_images, len(built.data.valid))  # type: ignore[arg-type]
    images = Subset(built.data.valid, range(count))
    if c.device is not None:
        net.to(c.device)
    result = search_widths(
        net,
        make_loader(images, JUDGED_TOGETHER, train=False),
        budget,
        c.searcher,
        seed=c.seed,
        out=folder,
        resume=True,
        progress=built.progress,
        judging=Judging(memory=c.search_memory, criterion=c.criterion),
        train_fn=lambda widths: train_alone(built, widths),
        **c.searcher_options,
    )
    used = budget.usage(net.graph, result.widths)
    built.say(f"search: {len(result.trials)} networks judged; best uses {used:.1%} of the budget {budget}")
    if "remark" in result.settings:
        built.say(f"search: {result.settings['remark']}")
    for phrase in describe_rows(result.measured):
        built.say(f"search: {phrase}")
    return result
