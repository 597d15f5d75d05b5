"""Build what a run works with, and refuse what makes no sense before anything is written or trained."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Subset

from widthkit.budget import Budget, parse_budget
from widthkit.errors import Option, OptionError
from widthkit.modules.merging import merge
from widthkit.modules.models import check_start
from widthkit.run.config import RunConfig
from widthkit.run.data import load_run_data
from widthkit.run.dense import check_outputs, factory_options, fresh_model, input_shape
from widthkit.run.folder import RunFolder
from widthkit.run.recipe import Recipe, TrainingRecipe
from widthkit.run.stage_plan import StagePlan
from widthkit.run.stages import Rank
from widthkit.search import SEARCHERS, Judging, check_searcher
from widthkit.search.measured import network_of
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
        say: Called with one line per step.
        progress: Show progress bars.
    """

    config: RunConfig
    folder: RunFolder
    data: DataSplits
    net: Supernet
    recipe: Recipe
    say: Say
    progress: bool = True

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
    recipe = folder.recipe(config, begins=begins)
    trainings = [recipe.supernet] + [recipe.calibration] * search + [recipe.final] * final
    for how in trainings:
        check_engine(how.mixed_precision, config.device)
    check_start(config.pretrained, config.weights, config.reset_head)
    if config.merges and config.stages > 1:
        raise OptionError(Option("merges", True), " goes with one stage: a later one would start without branches")
    folder.check_weights(config)
    data = load_run_data(config)
    net = _make_supernet(config, recipe, data)
    for how in trainings:
        make_optimizer(net, how)
        training_data(data, how, config.seed)
    built = Built(config, folder, data, net, recipe, say or (lambda line: print(line, file=sys.stderr)), progress)
    if search:
        _check_search(built)
    return built


def training_data(data: DataSplits, how: TrainingRecipe, seed: int) -> DataLoader[Any]:
    """Return the batches of a training, in the order of a seed.

    Raises:
        OptionError: If the data cannot be augmented as the recipe says.
    """
    return make_loader(data.train.augmented(how.augment), how.batch_size, train=True, seed=seed)


def _check_search(built: Built) -> None:
    """Refuse a search that could not start."""
    c = built.config
    built.stage_plan.check(built.net.space)
    Judging(memory=c.search_memory)
    check_searcher(c.searcher, built.net, built.budget, c.searcher_options, can_train=True)


def _make_supernet(config: RunConfig, recipe: Recipe, data: DataSplits) -> Supernet:
    model = fresh_model(config, data, config.seed, trained=True)
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
