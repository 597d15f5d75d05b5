"""Build what a run works with, and refuse what makes no sense before anything is written or trained."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from widthkit.budget import Budget, parse_budget
from widthkit.errors import Option, OptionError
from widthkit.modules.models import create_model, input_channels
from widthkit.run.config import RunConfig
from widthkit.run.folder import RunFolder
from widthkit.run.recipe import Recipe, TrainingRecipe
from widthkit.run.stage_plan import StagePlan
from widthkit.search import SEARCHERS, Judging, check_searcher
from widthkit.search.measured import network_of
from widthkit.supernet import Supernet, make_supernet
from widthkit.supernet.strategy import make_strategy
from widthkit.trace import trace
from widthkit.train import DataSplits, load_data, make_loader
from widthkit.train.engine import check_engine
from widthkit.train.optim import make_optimizer

Say = Callable[[str], None]

_SMALLEST_IMAGE = 32
"""Networks that halve their input five times have nothing left to see of an 8x8 image."""


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
        """How the search goes on from stage to stage.

        Raises:
            OptionError: If there are several stages and the space has no FLOPs-sensitive bins.
        """
        c = self.config
        if c.stages != 1 and c.bins is None:
            raise OptionError("a search in stages needs FLOPs-sensitive bins; train the supernet with ", Option("bins"))
        return StagePlan(self.budget, c.stages, c.alpha, c.bins or 1.0, c.min_width, c.divisor, c.fixed)

    @property
    def factory_options(self) -> dict[str, Any]:
        """The arguments with which the model's factory builds the dense model for the data's classes."""
        return {"num_classes": self.data.num_classes, **self.config.model_options}


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
    data = _load_data(config)
    net = _make_supernet(config, recipe, data)
    for how in trainings:
        make_optimizer(net, how)
        training_data(data, how, config.seed)
    built = Built(config, folder, data, net, recipe, say or (lambda line: print(line, file=sys.stderr)), progress)
    if search:
        _check_search(built)
    return built


def fresh_model(config: RunConfig, data: DataSplits, seed: int, *, pretrained: bool = False) -> nn.Module:
    """Build the dense model for the data's classes, with weights drawn from a seed.

    Args:
        config: Names the model.
        data: Its classes.
        seed: Draws the weights.
        pretrained: Copy the library's weights; a new head keeps its own.
    """
    options = {"num_classes": data.num_classes, **config.model_options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model(config.model, **options)
    if pretrained:
        load_matching(model, create_model(config.model, pretrained=True, **config.model_options))
    return model


def load_matching(model: nn.Module, pretrained: nn.Module) -> list[str]:
    """Copy every tensor whose name and shape agree; return the names of those that stay as they are."""
    source = pretrained.state_dict()
    own = model.state_dict()
    fitting = {n: t for n, t in source.items() if n in own and own[n].shape == t.shape}
    model.load_state_dict(fitting, strict=False)
    return sorted(set(own) - set(fitting))


def training_data(data: DataSplits, how: TrainingRecipe, seed: int) -> DataLoader[Any]:
    """Return the batches of a training, in the order of a seed.

    Raises:
        OptionError: If the data cannot be augmented as the recipe says.
    """
    return make_loader(data.train.augmented(how.augment), how.batch_size, train=True, seed=seed)


def input_shape(data: DataSplits, batch: int = 1) -> tuple[int, ...]:
    """Return the shape of a batch of the data's images."""
    return (batch, *data.train[0][0].shape)


def _check_search(built: Built) -> None:
    """Refuse a search that could not start."""
    c = built.config
    built.stage_plan.check(built.net.space)
    Judging(memory=c.search_memory)
    check_searcher(c.searcher, built.net, built.budget, c.searcher_options, can_train=True)


def _load_data(config: RunConfig) -> DataSplits:
    channels = input_channels(create_model(config.model, **config.model_options))
    data = _read_data(config, config.image_size, channels)
    if config.image_size is None and min(data.native_size) < _SMALLEST_IMAGE:
        return _read_data(config, _SMALLEST_IMAGE, channels)
    return data


def _read_data(config: RunConfig, image_size: int | None, channels: int) -> DataSplits:
    return load_data(
        config.data,
        data_dir=config.data_dir,
        image_size=image_size,
        in_channels=channels,
        seed=config.seed,
        limit=config.limit,
    )


def _make_supernet(config: RunConfig, recipe: Recipe, data: DataSplits) -> Supernet:
    model = fresh_model(config, data, config.seed, pretrained=config.pretrained)
    return make_supernet(
        model,
        make_strategy(config.strategy, config.strategy_options).for_budget(config.budget),
        graph=trace(model, input_shape(data), freeze=config.freeze),
        k=config.k,
        bins=config.bins,
        min_width=config.min_width,
        max_width=config.max_width,
        divisor=config.divisor,
        fixed=config.fixed,
        seed=config.seed,
        rank=config.rank,
        rank_data=_ranking_batches(config, recipe, data) if config.rank else None,
    )


def _ranking_batches(config: RunConfig, recipe: Recipe, data: DataSplits) -> Iterable[Any]:
    count = min(config.rank_images, len(data.train))  # type: ignore[arg-type]
    return make_loader(Subset(data.train, range(count)), recipe.supernet.batch_size, train=False)
