"""The options of a run: one place, and the same defaults as the Python functions."""

import inspect
from pathlib import Path

import pytest

import widthkit as wk
from widthkit.errors import OptionError
from widthkit.run.config import RunConfig, run_options
from widthkit.run.options_table import options_table
from widthkit.run.recipe import TrainingRecipe
from widthkit.run.stage_plan import StagePlan
from widthkit.run.stages import search_in_stages
from widthkit.search import SEARCHERS, Judging
from widthkit.supernet.strategy import STRATEGIES
from widthkit.train import TrainSettings
from widthkit.train.augment import augmentation

ROOT = Path(__file__).parents[2]
STAGED = {"stages"}
"""A search in stages has three of them where a run has one stage."""


@pytest.mark.parametrize(
    ("function", "shared", "least"),
    [
        (wk.make_supernet, {"budget": ""}, 8),
        (wk.train, {}, 2),
        (wk.load_data, {}, 4),
        (wk.search, {}, 1),
        (Judging, {"memory": "search_memory", "batch_size": ""}, 1),
        (search_in_stages, {}, 4),
        (StagePlan, {}, 3),
    ],
    ids=lambda item: getattr(item, "__name__", ""),
)
def test_python_and_command_line_have_the_same_defaults(function, shared, least):
    config = RunConfig(model="timm/resnet10t", data="digits")
    compared, recipe_fields = 0, TrainingRecipe.model_fields
    for name, parameter in inspect.signature(function).parameters.items():
        field = shared.get(name, name)
        if field not in RunConfig.model_fields or parameter.default is parameter.empty or field in STAGED:
            continue
        if name in ("strategy", "searcher"):
            registry = STRATEGIES if name == "strategy" else SEARCHERS
            # Either the function names no default and takes the registry's, or it names the same one.
            assert parameter.default in (None, registry.default)
            continue
        if field == "augment":
            assert augmentation(parameter.default) == config.resolved().supernet.augment
            continue
        # A run takes the recipe's values where no option replaces them.
        ours = config.resolved().supernet if getattr(config, field) is None and field in recipe_fields else config
        # No fixed groups and no frozen modules are written in several ways.
        assert (parameter.default or None) == (getattr(ours, field) or None), name
        compared += 1
    assert compared >= least


@pytest.mark.parametrize(("training", "others"), [("supernet", {}), ("calibration", {"epochs": 2}), ("final", {})])
def test_the_default_recipe_is_what_python_does_by_default(training, others):
    how = getattr(RunConfig(model="timm/resnet10t", data="digits").resolved(), training)
    assert TrainSettings(**{**how.keywords(), "epochs": how.epochs}) == TrainSettings(**others)
    # A recipe that says nothing leaves the rest as it is, too.
    assert how == TrainingRecipe(**others)
    assert how.augment == augmentation(inspect.signature(wk.load_data).parameters["augment"].default)


def test_default_plug_ins_are_those_of_the_registries():
    config = RunConfig(model="timm/resnet10t", data="digits")
    assert (config.strategy, config.searcher) == (STRATEGIES.default, SEARCHERS.default)


def test_every_option_is_declared_in_full():
    flags = [option.flag for option in run_options().values()]
    assert len(set(flags)) == len(flags)
    for name, option in run_options().items():
        assert option.field.title, name
        assert option.field.description, name
        assert option.commands, name
        assert option.group, name


def test_the_table_of_the_docs_is_up_to_date():
    assert (ROOT / "docs" / "options.md").read_text() == options_table()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "digits"}, "model is missing"),
        ({"model": "m", "data": "digits", "kk": 3}, "a run has no option 'kk'"),
        ({"model": "m", "data": "digits", "k": "many"}, "k='many': "),
        ({"model": "m", "data": "digits", "divisor": 0}, "divisor=0: it must be at least 1"),
        ({"model": "m", "data": "digits", "lr": 0}, "lr=0: it must be above 0"),
        ({"model": "m", "data": "digits", "fixed": {"conv1": "wide"}}, "fixed='wide': "),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_named(options, message):
    with pytest.raises(OptionError) as refused:
        RunConfig(**options)
    assert message in str(refused.value)
