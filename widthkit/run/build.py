"""Build what a run works with, and refuse what makes no sense before anything is written or trained."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Subset

from widthkit.budget import Budget, parse_budget
from widthkit.errors import Option, OptionError
from widthkit.modules.merging import merge
from widthkit.modules.models import check_start
from widthkit.run.config import RunConfig
from widthkit.run.data import load_run_data
from widthkit.run.dense import (
    check_outputs,
    factory_options,
    fresh_model,
    has_trained_weights,
    input_shape,
    load_trained,
)
from widthkit.run.folder import RunFolder
from widthkit.run.recipe import Recipe, TrainingRecipe
from widthkit.run.stage_plan import StagePlan
from widthkit.run.stages import Rank
from widthkit.search import SEARCHERS, Judging, check_searcher
from widthkit.search.measured import network_of
from widthkit.search.searcher import OneShotSearcher
from widthkit.supernet import Supernet, make_supernet
from widthkit.supernet.ranking import unit_scores
from widthkit.supernet.strategy import make_strategy
from widthkit.trace import trace
from widthkit.train import DataSplits, make_loader
from widthkit.train.engine import check_engine
from widthkit.train.optim import make_optimizer

Say = Callable[[str], None]


@dataclass(frozen=True)
class Built:
    """What the steps of a run work with.

    Args:
        config: The options.
        folder: Where results go.
        data: The data set.
        net: The supernet of the first stage.
        recipe: How networks are trained.
        fresh: Names of the dense network's tensors that no training before the run has seen.
        say: Called with one line per step.
        progress: Show progress bars.
    """

    config: RunConfig
    folder: RunFolder
    data: DataSplits
    net: Supernet
    recipe: Recipe
    fresh: tuple[str, ...]
    say: Say
    progress: bool = True

    @property
    def is_trained(self) -> bool:
        """Whether the dense network was trained for this task before the run: nothing in it is fresh."""
        return not self.fresh

    @property
    def budget(self) -> Budget:
        """The budget of the slim network."""
        return parse_budget(self.config.budget, self.net.graph, lambda widths: network_of(self.net, widths))

    @property
    def stage_plan(self) -> StagePlan:
        """How the search goes on from stage to stage."""
        c = self.config
        return StagePlan(self.budget, c.stages, c.alpha, c.bins, c.min_width, c.divisor, c.fixed)

    @property
    def rank(self) -> Rank | None:
        """How later stages rank the units of their supernets."""
        if self.config.rank is None:
            return None
        return partial(
            unit_scores, criterion=self.config.rank, data=_ranking_batches(self.config, self.recipe, self.data)
        )

    @property
    def factory_options(self) -> dict[str, Any]:
        """The arguments with which the model is built for the data's classes, merged where its blocks merge."""
        merged = {"merged": True} if self.config.merges else {}
        return {**factory_options(self.config, self.data.num_classes), **merged}


def build(
    config: RunConfig,
    folder: RunFolder,
    *,
    search: bool = True,
    final: bool = False,
    begins: bool = True,
    say: Say | None = None,
    progress: bool = True,
) -> Built:
    """Load the data and build the untrained supernet.

    Args:
        config: The options.
        folder: Where results go; nothing is written yet.
        search: A search follows; its options are checked too.
        final: Final trainings follow; their options are checked too.
        begins: The run may begin here; otherwise the folder holds it, and it goes on by its own recipe.
        say: Called with one line per step; standard error by default.
        progress: Show progress bars.

    Raises:
        WidthkitError: If an option makes no sense here.
    """
    if search:
        SEARCHERS.get(config.searcher)
        for name in config.compare:
            if not issubclass(SEARCHERS.get(name), OneShotSearcher):
                raise OptionError(Option("compare", [name]), ": this searcher judges networks; name it as the searcher")
    recipe = folder.recipe(config, begins=begins)
    trainings = [recipe.supernet] + [recipe.calibration] * search + [recipe.final] * final
    for how in trainings:
        check_engine(how.mixed_precision, config.device)
    check_start(config.pretrained, config.weights, config.reset_head)
    if config.merges and config.stages > 1:
        raise OptionError(Option("merges", True), " goes with one stage: a later one would start without branches")
    folder.check_weights(config, begins=begins)
    data = load_run_data(config)
    model, fresh = _start(config, data)
    net = _make_supernet(config, recipe, data, model)
    for how in trainings:
        make_optimizer(net, how)
        training_data(data, how, config.seed)
    built = Built(
        config, folder, data, net, recipe, fresh, say or (lambda line: print(line, file=sys.stderr)), progress
    )
    if search:
        _check_trained(built)
        _check_search(built)
    return built


def training_data(data: DataSplits, how: TrainingRecipe, seed: int) -> DataLoader[Any]:
    """Return the batches of a training, in the order of a seed.

    Raises:
        OptionError: If the data cannot be augmented as the recipe says.
    """
    return make_loader(data.train.augmented(how.augment), how.batch_size, train=True, seed=seed)


def _check_trained(built: Built) -> None:
    """Refuse to judge sub-networks that nothing has trained."""
    if built.recipe.supernet.epochs:
        return
    if built.net.strategy.needs_training:
        why = f"strategy '{built.config.strategy}' judges sub-networks that it has trained"
    elif built.is_trained or issubclass(SEARCHERS.get(built.config.searcher), OneShotSearcher):
        return
    elif has_trained_weights(built.config):
        why = f"the weights lack {built.fresh[0]} and {len(built.fresh) - 1} more tensors"
    else:
        why = "the network has no trained weights"
    raise OptionError(f"{why}, so it must be trained before widths are searched; pass ", Option("epochs", 5))


def _check_search(built: Built) -> None:
    """Refuse a search that could not start."""
    c = built.config
    built.stage_plan.check(built.net.space)
    Judging(memory=c.search_memory)
    check_searcher(c.searcher, built.net, built.budget, c.searcher_options, can_train=True)


def _start(config: RunConfig, data: DataSplits) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the dense model that the supernet starts from, and the names of its tensors that no training has seen."""
    model = fresh_model(config, data, config.seed)
    if has_trained_weights(config):
        return model, load_trained(model, config)
    return model, tuple(model.state_dict())


def _make_supernet(config: RunConfig, recipe: Recipe, data: DataSplits, model: nn.Module) -> Supernet:
    plain = merge(model) if config.merges else model
    graph = trace(plain, input_shape(data), freeze=config.freeze)
    check_outputs(model, config, data)
    return make_supernet(
        model,
        make_strategy(config.strategy, config.strategy_options),
        budget=config.budget,
        graph=graph,
        k=config.k,
        bins=config.bins,
        min_width=config.min_width,
        max_width=config.max_width,
        divisor=config.divisor,
        fixed=config.fixed,
        seed=config.seed,
        merges=config.merges,
        rank=config.rank,
        rank_data=_ranking_batches(config, recipe, data) if config.rank else None,
    )


def _ranking_batches(config: RunConfig, recipe: Recipe, data: DataSplits) -> Iterable[Any]:
    count = min(config.rank_images, len(data.train))  # type: ignore[arg-type]
    return make_loader(Subset(data.train, range(count)), recipe.supernet.batch_size, train=False)
