"""Recipes: the shipped ones, the form of a file, overriding, and what a run keeps of them."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from command import here
from torch import nn

import widthkit as wk
from widthkit.errors import CheckpointError, OptionError
from widthkit.run.build import build
from widthkit.run.config import RunConfig
from widthkit.run.folder import RunFolder
from widthkit.run.recipe import TRAININGS, TrainingRecipe, recipe
from widthkit.run.steps import train_supernet
from widthkit.train.augment import Augmentation

SHIPPED = Path(wk.__file__).parent / "recipes"
TINY = {"model": "benchmarks.nets:plain_cnn", "data": "digits", "image_size": 16, "limit": 60, "k": 4}
OTHERS = {"batch_size": 30, "lr": 0.01, "epochs": 1, "final_epochs": 1}


def write(tmp_path, text, name="my.yaml"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def run_of(tmp_path, **options):
    return RunConfig(**TINY, **{**OTHERS, **options}), RunFolder(tmp_path / "run")


def trained(tmp_path, **options):
    """Begin a run and train its supernet."""
    config, folder = run_of(tmp_path, **options)
    built = build(config, folder, search=False, say=lambda line: None, progress=False)
    folder.begin(config, "train", resume=False)
    train_supernet(built)
    return config, folder


# --- the shipped ones -------------------------------------------------------------------------------------------------


def test_all_recipes_are_there():
    assert set(wk.recipes()) == {path.stem for path in SHIPPED.glob("*.yaml")}
    for method in ("autoslim", "bcnet", "cafenet", "pas"):
        assert f"{method}-resnet50" in wk.recipes()
    for name in ("default", "finetune", "cifar-resnet-finetune", "digits", "fashion-mnist", "channel-bench-macro"):
        assert name in wk.recipes()


@pytest.mark.parametrize("name", wk.recipes())
def test_every_recipe_trains_two_steps_of_each_training(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Linear(4, 10))
    shipped = wk.recipe(name)
    for training in TRAININGS:
        # Two epochs of one step, so that those with a warm-up leave it.
        warm = min(1, getattr(shipped, training).warmup_epochs)
        how = getattr(shipped.changed({"epochs": 2, "warmup_epochs": warm, "batch_size": 20}), training)
        data = wk.load_data("digits", limit=20, image_size=16, augment=how.augment)
        before = [p.detach().clone() for p in net.parameters()]
        loader = wk.make_loader(data.train, how.batch_size, train=True)
        result = wk.train(net, loader, how.epochs, device="cpu", progress=False, **how.keywords())
        assert len(result.history) == 2
        assert torch.isfinite(torch.tensor([result.loss, result.accuracy])).all()
        assert not all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_value_of_a_recipe_says_where_it_comes_from(path):
    text = path.read_text()
    values = [line for line in text.splitlines() if re.match(r"\s+\w+: *[^ #]", line)]
    assert len(values) > 8
    sources = r"#.*(section|appendix|ours|not stated|not known|none|sections)"
    assert [line for line in values if not re.search(sources, line)] == []
    assert yaml.safe_load(text)["about"].endswith(".")


# --- the form ---------------------------------------------------------------------------------------------------------


def test_common_values_are_in_all_trainings_and_can_be_replaced(tmp_path):
    text = (
        "about: Mine.\ncommon: {lr: 1e-2, augment: {crop: 4, flip: true}}\nfinal: {lr: 3e-4, augment: {mixup: 0.2}}\n"
    )
    mine = wk.recipe(write(tmp_path, text))
    assert [getattr(mine, training).lr for training in TRAININGS] == [0.01, 0.01, 0.0003]
    assert mine.supernet.augment == Augmentation(crop=4, flip=True)
    assert mine.final.augment == Augmentation(crop=4, flip=True, mixup=0.2)
    assert mine.calibration.weight_decay == TrainingRecipe().weight_decay


def test_yaml_says_no_and_true():
    made = recipe("default").changed({"mixed_precision": False, "augment": True, "final.augment": False})
    assert made.supernet.mixed_precision == "no"
    assert made.supernet.augment == Augmentation(crop=0.125, flip=True)
    assert made.final.augment == Augmentation()


@pytest.mark.parametrize("name", ["default", "cafenet-cifar10-vgg19", "bcnet-efficientnet-b0"])
def test_written_recipes_are_read_again(name, tmp_path):
    assert wk.recipe(write(tmp_path, wk.recipe(name).to_yaml())) == wk.recipe(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("about: a\nfinal: {lrr: 1}", "my.yaml: unknown setting 'final.lrr': did you mean lr?"),
        ("common: {epoch: 1}", "my.yaml: unknown setting 'common.epoch': did you mean epochs?"),
        ("common: {augment: {crp: 1}}", "my.yaml: unknown setting 'common.augment.crp': did you mean crop?"),
        ("finale: {lr: 1}", "my.yaml: unknown setting 'finale': did you mean final?"),
        ("final: {lr: fast}", "my.yaml: final.lr must be a number, not 'fast'."),
        ("final: {schedule: cosin}", "my.yaml: unknown final.schedule 'cosin': did you mean cosine?"),
        ("final: {optimizer: sgdd}", "my.yaml: final: unknown optimizer 'sgdd'"),
        ("final: {epochs: 3, warmup_epochs: 3}", "my.yaml: final: warmup_epochs=3 leaves no epoch of 3; lower it."),
        ("final: {augment: {crop: 1, resized_crop: 0.1}}", "my.yaml: final: augment: crop=1 and resized_crop=0.1 cut"),
        ("final: [1, 2]", "my.yaml: final must be a valid dictionary, not [1, 2]."),
        ("final: {batch_size: 0}", "my.yaml: final.batch_size must be at least 1, not 0."),
        ("- 1", "my.yaml must hold settings by name"),
        ("final: {lr", "my.yaml is no YAML"),
    ],
    ids=str,
)
def test_wrong_files_are_refused_with_their_name_in_one_line(tmp_path, text, message):
    with pytest.raises(OptionError) as refused:
        wk.recipe(write(tmp_path, text))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_recipes_that_do_not_exist(tmp_path):
    with pytest.raises(OptionError, match=r"unknown recipe 'autoslim-resnet5': did you mean autoslim-resnet50"):
        wk.recipe("autoslim-resnet5")
    with pytest.raises(OptionError, match=r"none\.yaml cannot be read"):
        wk.recipe(tmp_path / "none.yaml")


# --- overriding -------------------------------------------------------------------------------------------------------


def test_what_is_said_of_one_training_counts_more():
    made = recipe("default").changed({"final.lr": 0.01, "lr": 0.1, "common.batch_size": 7, "supernet.batch_size": 8})
    assert [getattr(made, training).lr for training in TRAININGS] == [0.1, 0.1, 0.01]
    assert [getattr(made, training).batch_size for training in TRAININGS] == [8, 7, 7]
    assert recipe("default").changed({}) == recipe("default")
    with pytest.raises(OptionError, match=r"unknown setting 'common.lrr': did you mean lr\?"):
        made.changed({"lrr": 1})


def test_options_of_a_run_replace_values_of_the_recipe():
    config = RunConfig(
        model="m", data="d", recipe="cafenet-resnet50", set={"final.lr": 0.3, "final.augment.resized_crop": "none"},
        lr=0.2, clip_grad="none", batch_size=4, epochs=0, stand_alone_epochs=6, final_epochs=9, mixed_precision="bf16",
    )  # fmt: skip
    made, shipped = config.resolved(), recipe("cafenet-resnet50")
    assert [getattr(made, training).epochs for training in TRAININGS] == [0, 6, 9]
    assert [getattr(made, training).lr for training in TRAININGS] == [0.2, 0.2, 0.3]
    assert {getattr(made, training).clip_grad for training in TRAININGS} == {None}
    assert {getattr(made, training).batch_size for training in TRAININGS} == {4}
    assert made.final.augment.resized_crop is None
    assert made.supernet.augment == shipped.supernet.augment
    assert made.supernet.weight_decay == shipped.supernet.weight_decay
    assert RunConfig(model="m", data="d", augment=True).resolved().final.augment == Augmentation(crop=0.125, flip=True)
    assert RunConfig(model="m", data="d").resolved() == recipe("default")


def test_the_command_lists_and_prints_recipes(capfd, monkeypatch, tmp_path):
    done = here(capfd, monkeypatch, "recipes")
    assert done.returncode in (0, None)
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(wk.recipes())
    done = here(capfd, monkeypatch, "recipes", "digits")
    assert wk.recipe(write(tmp_path, done.stdout)) == wk.recipe("digits")


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_recipe(tmp_path):
    mine = write(tmp_path, "common: {lr: 0.01, batch_size: 30}\nsupernet: {epochs: 1}\nfinal: {epochs: 1}\n")
    options = {"lr": None, "batch_size": None, "epochs": None, "final_epochs": None}
    config, folder = trained(tmp_path, recipe=str(mine), **options)
    stored = wk.recipe(folder.path / "recipe.yaml")
    assert stored == wk.recipe(mine)
    folder.begin(config, "train", resume=True)
    mine.write_text(mine.read_text().replace("0.01", "0.02"))
    with pytest.raises(OptionError, match=r"with supernet.lr=0.01, .*my.yaml now says supernet.lr=0.02; put"):
        folder.begin(config, "train", resume=True)
    # Later steps need the file no more.
    mine.unlink()
    assert build(folder.config(), folder, search=False, progress=False).recipe == stored


def test_a_changed_shipped_recipe_changes_no_old_run(tmp_path):
    config, folder = trained(tmp_path, lr=None)
    text = (folder.path / "recipe.yaml").read_text()
    assert "lr: 0.05" in text
    (folder.path / "recipe.yaml").write_text(text.replace("lr: 0.05", "lr: 0.04"))  # as if "default" had said so then
    folder.begin(config, "train", resume=True)
    assert folder.recipe(config).supernet.lr == 0.04
    # A later step may still have values of its own.
    later = folder.recipe(config.changed({"stand_alone_epochs": 3, "final_epochs": 4}))
    assert (later.calibration.epochs, later.final.epochs, later.final.lr) == (3, 4, 0.04)
    (folder.path / "recipe.yaml").write_text("supernet: {lr: [")
    with pytest.raises(CheckpointError, match="the run is damaged"):
        folder.recipe(config)


@pytest.mark.parametrize("other", [{"recipe": "digits"}, {"set": {"final.lr": 0.5}}, {"lr": 0.3}], ids=str)
def test_a_run_is_not_resumed_with_another_recipe(tmp_path, other):
    config, folder = trained(tmp_path)
    with pytest.raises(OptionError, match=f"holds a run with .*{next(iter(other))}="):
        folder.begin(config.changed(other), "train", resume=True)


def test_each_training_follows_its_own_part(tmp_path, capfd, monkeypatch):
    out = tmp_path / "run"
    words = [
        "slim",
        TINY["model"],
        "--data",
        "digits",
        "--image-size",
        "16",
        "--limit",
        "60",
        "--k",
        "4",
        "--lr",
        "0.01",
    ]
    words += ["--searcher", "random", "--searcher-option", "n=3", "--out", out]
    words += ["--set", "supernet.batch_size=20", "--set", "final.batch_size=15", "--set", 'final.augment={"mixup":0.2}']
    done = here(capfd, monkeypatch, *words, "--epochs", "2", "--final-epochs", "1")
    assert done.returncode in (0, None), done.stderr
    stored = wk.recipe(out / "recipe.yaml")
    assert json.loads((out / "results.json").read_text())["recipe"] == stored.model_dump(mode="json")
    assert (stored.supernet.batch_size, stored.final.batch_size, stored.final.augment.mixup) == (20, 15, 0.2)
    assert not stored.supernet.augment.mixup
    again = here(capfd, monkeypatch, *words, "--epochs", "2", "--final-epochs", "1", "--resume")
    assert again.returncode in (0, None), again.stderr


def test_no_epochs_train_nothing(tmp_path, capfd, monkeypatch):
    config, folder = run_of(tmp_path, epochs=0, final_epochs=0, strategy="whole", searcher="uniform")
    built = build(config, folder, final=True, say=lambda line: None, progress=False)
    folder.begin(config, "slim", resume=False)
    before = {name: tensor.clone() for name, tensor in built.net.state_dict().items()}
    train_supernet(built)
    assert all(torch.equal(before[name], tensor) for name, tensor in built.net.state_dict().items())
    assert not folder.supernet().exists()
    train = ["train", TINY["model"], "--data", "digits", "--image-size", "16", "--limit", "60", "--k", "4"]
    train += ["--strategy", "whole"]
    out, mine = tmp_path / "other", write(tmp_path, "supernet: {epochs: 0}")
    assert here(capfd, monkeypatch, *train, "--recipe", mine, "--out", out).returncode in (0, None)
    mine.unlink()  # the run has a copy
    done = here(capfd, monkeypatch, "search", out, "--searcher", "uniform")
    assert done.returncode in (0, None), done.stderr
    done = here(capfd, monkeypatch, "export", out)
    assert done.returncode in (0, None), done.stderr
    assert (out / "slim.safetensors").exists()


def test_a_start_without_results_leaves_no_recipe_behind(tmp_path):
    mine = write(tmp_path, "common: {lr: 0.01}")
    config, folder = run_of(tmp_path, recipe=str(mine), lr=None)
    folder.begin(config, "train", resume=False)
    mine.write_text("common: {lr: 0.02}")
    assert build(config, folder, search=False, progress=False).recipe.supernet.lr == 0.02
    folder.begin(config, "train", resume=False)
    assert wk.recipe(folder.path / "recipe.yaml").supernet.lr == 0.02
