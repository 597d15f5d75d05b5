"""Runs on trained networks from start to end: what is kept, what teaches, what is compared, what is refused."""

import json

import pytest
import torch
from command import here

import widthkit as wk
from widthkit.errors import OptionError
from widthkit.export import export
from widthkit.graph.plan import kept_units
from widthkit.run import steps
from widthkit.run.build import build
from widthkit.run.command_line import command_line
from widthkit.run.folder import RunFolder
from widthkit.run.new_config import new_config
from widthkit.run.recipe import recipe
from widthkit.train import evaluate, load_data, make_loader

NET = """
from torch import nn


def ten():
    layers = [nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model, and weights of it that a short training on the digits gave."""
    path = tmp_path_factory.mktemp("net")
    (path / "small.py").write_text(NET)
    torch.manual_seed(0)
    model = wk.create_model(f"{path}/small.py:ten")
    data = load_data("digits", image_size=32)
    wk.train(model, make_loader(data.train, 32, train=True), 3, lr=0.1, progress=False)
    torch.save(model.state_dict(), path / "w.pth")
    return path


def options(trained, **more):
    named = {"model": f"{trained}/small.py:ten", "data": "digits", "k": 4, "limit": 100}
    return {**named, "weights": str(trained / "w.pth"), **more}


def test_one_command_slims_a_trained_network(trained, tmp_path, capfd, monkeypatch):
    words = [f"{trained}/small.py:ten", "--weights", trained / "w.pth", "--data", "digits", "--k", 4]
    words += ["--final-epochs", 1, "--batch-size", 64, "--compare", "importance", "--out", tmp_path / "out"]
    done = here(capfd, monkeypatch, "slim", *words)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {row["network"]: row for row in results["table"]}
    assert list(rows) == ["dense", "uniform", "importance", "searched"]
    data = load_data("digits", image_size=32)
    dense = wk.create_model(f"{trained}/small.py:ten", weights=trained / "w.pth")
    truth = evaluate(dense, make_loader(data.test, 512, train=False))["accuracy"]
    assert rows["dense"]["accuracy"] == [truth]  # as it was given: nothing has trained it
    assert not list((tmp_path / "out").glob("final/dense*"))
    assert not (tmp_path / "out" / "supernet").exists()
    assert f"dense: {truth:.2%} on 359 test images" in done.stderr
    # One epoch from the trained units, with the teacher, keeps what it knows.
    assert rows["searched"]["accuracy_mean"] > 0.7 * truth
    assert recipe(tmp_path / "out" / "recipe.yaml").options["strategy"] == "whole"


def test_without_final_epochs_the_slim_network_holds_the_dense_networks_units(trained, tmp_path, capfd, monkeypatch):
    words = [f"{trained}/small.py:ten", "--weights", trained / "w.pth", "--data", "digits", "--k", 4, "--limit", 100]
    done = here(capfd, monkeypatch, "slim", *words, "--final-epochs", 0, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    slim = wk.load(tmp_path / "out" / "slim", allow=[f"{trained}/small.py:ten"])
    rows = {tuple(row.flatten().tolist()) for row in torch.load(trained / "w.pth")["0.weight"]}
    assert all(tuple(row.flatten().tolist()) in rows for row in slim[0].weight.detach())


def test_the_network_of_a_search_in_untrained_stages_is_the_one_that_was_judged(trained, tmp_path, monkeypatch):
    config = new_config(**options(trained, stages=3))
    built = build(config, RunFolder(tmp_path), final=True, progress=False, say=lambda line: None)
    built.folder.begin(config, "slim", False)
    seen, plain = [], steps.run_stages
    monkeypatch.setattr(steps, "run_stages", lambda *args: seen.append(plain(*args)) or seen[-1])
    result = steps.search(built)
    judged = export(seen[0].net, result.widths)
    delivered = export(steps.supernet_of(built, result.widths), result.widths)
    assert kept_units(built.net.graph, result.widths)
    for name, tensor in judged.state_dict().items():
        assert torch.equal(tensor, delivered.state_dict()[name]), name


def test_what_nothing_has_trained_is_not_searched(trained, tmp_path):
    fresh = options(trained, recipe="finetune", out=None)
    del fresh["out"], fresh["weights"]
    with pytest.raises(OptionError, match=r"no trained weights, so it must be trained .* epochs=5"):
        build(new_config(**fresh), RunFolder(tmp_path))
    torch.save({n: t for n, t in torch.load(trained / "w.pth").items() if n != "8.weight"}, tmp_path / "headless.pth")
    headless = options(trained, weights=str(tmp_path / "headless.pth"), reset_head=True)
    with pytest.raises(OptionError, match="the weights lack 8"):
        build(new_config(**headless), RunFolder(tmp_path))
    with pytest.raises(OptionError, match="strategy 'ua' judges sub-networks that it has trained"):
        build(new_config(**options(trained, strategy="ua")), RunFolder(tmp_path))
    build(new_config(**options(trained, strategy="ua", epochs=1)), RunFolder(tmp_path), say=lambda line: None)


def test_a_search_refuses_weights_that_have_changed(trained, tmp_path, capfd, monkeypatch):
    (tmp_path / "w.pth").write_bytes((trained / "w.pth").read_bytes())
    words = [f"{trained}/small.py:ten", "--weights", tmp_path / "w.pth", "--data", "digits", "--k", 2, "--limit", 100]
    assert here(capfd, monkeypatch, "train", *words, "--out", tmp_path / "out").returncode == 0
    changed = {name: 2 * tensor for name, tensor in torch.load(tmp_path / "w.pth").items()}
    torch.save(changed, tmp_path / "w.pth")
    done = here(capfd, monkeypatch, "search", tmp_path / "out")
    assert done.returncode == 2
    assert "has changed since the run" in done.stderr


def test_what_a_user_sets_counts_more_than_the_recipe(trained):
    tuned = new_config(**options(trained, set={"epochs": 4})).resolved()
    assert [tuned.supernet.epochs, tuned.calibration.epochs, tuned.final.epochs] == [4, 4, 4]
    own = new_config(**options(trained, searcher="random", rank="none"))
    assert (own.strategy, own.searcher, own.rank) == ("whole", "random", None)
    assert own.resolved().options["searcher"] == "random"


def test_recipes_hold_no_settings_as_options(trained, tmp_path):
    (tmp_path / "mine.yaml").write_text("options: {epochs: 3}\n")
    with pytest.raises(OptionError, match="'epochs' is no option that a recipe may hold"):
        new_config(**options(trained, recipe=str(tmp_path / "mine.yaml")))


@pytest.mark.parametrize(
    "more", [{}, {"recipe": "default"}, {"rank": "none"}, {"strategy": "bc", "epochs": 2}, {"searcher": "guided"}]
)
def test_the_line_that_finishes_a_run_means_the_same_run(trained, more):
    from widthkit.cli.app import app  # noqa: F401  (commands are registered when it is imported)
    from widthkit.run.config import run_options

    config = new_config(**options(trained, **more))
    words = command_line("slim", config).split()[2:]
    given = {"model": words[0]}
    flags = {option.flag: option for option in run_options().values()}
    for flag, text in zip(words[1::2], words[2::2], strict=True):
        declared = flags[flag]
        given[declared.name] = declared.kind(declared.read(text)) if declared.kind in (int, float) else text
    assert new_config(**given) == config
