"""Interrupted runs: export refuses and says how to finish them, and what is finished that way is the whole run."""

import json
import shlex

import pytest
import torch
from command import here
from safetensors.torch import load_file

import widthkit as wk
from widthkit.errors import CheckpointError
from widthkit.run.build import build, training_data
from widthkit.run.config import RunConfig
from widthkit.run.final import finish
from widthkit.run.folder import RunFolder
from widthkit.run.steps import load_supernet, search, train_supernet

TINY = {"model": "benchmarks.nets:plain_cnn", "data": "digits", "image_size": 16, "limit": 60, "batch_size": 30}
CONFIG = RunConfig(**TINY, k=4, lr=0.01, epochs=2, final_epochs=1, searcher="random", searcher_options={"n": 3})


SLIM_FILES = ("slim.safetensors", "slim.json", "slim.safetensors.json")


class Stopped(Exception):
    pass


def started(tmp_path, config=CONFIG, command="slim"):
    built = build(config, RunFolder(tmp_path / "run"), final=True, say=lambda line: None, progress=False)
    built.folder.begin(config, command, resume=False)
    return built


def train_one_epoch(built):
    """Train a supernet as the run does, but end after one epoch, as a killed process would."""

    def stop(entry):
        raise Stopped

    how, seed = built.recipe.supernet, built.config.seed
    batches = training_data(built.data, how, seed)
    options = {"seed": seed, "out": built.folder.supernet(), "progress": False, **how.keywords()}
    with pytest.raises(Stopped):
        wk.train(built.net, batches, how.epochs, on_epoch=stop, **options)


def files(folder):
    return {p: p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def export_refuses(capfd, monkeypatch, folder, *args):
    before = files(folder)
    done = here(capfd, monkeypatch, "export", folder, *args)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert files(folder) == before
    return done.stderr


def test_a_supernet_that_is_half_trained_is_not_exported(tmp_path, capfd, monkeypatch):
    built = started(tmp_path, command="train")
    train_one_epoch(built)
    widths = tmp_path / "widths.json"
    widths.write_text(json.dumps(built.net.graph.full))
    said = export_refuses(capfd, monkeypatch, built.folder.path, "--widths", widths)
    assert "has 1 of 2 epochs; finish it with: widthkit train " in said
    with pytest.raises(CheckpointError, match="1 of 2 epochs"):
        load_supernet(built)
    done = here(capfd, monkeypatch, "search", built.folder.path, "--budget", "0.3x")
    assert done.returncode == 2
    assert done.stderr == said  # the training's options, not the search's
    # The line that the refusal names finishes the training.
    line = shlex.split(said.partition("finish it with: ")[2])
    done = here(capfd, monkeypatch, *line[1:])
    assert done.returncode == 0, done.stderr
    done = here(capfd, monkeypatch, "export", built.folder.path, "--widths", widths)
    assert done.returncode == 0, done.stderr
    assert (built.folder.path / "slim.safetensors").exists()


def test_every_interruption_of_a_run_is_named_and_finished(tmp_path, capfd, monkeypatch):
    whole = started(tmp_path / "whole")
    train_supernet(whole)
    finish(whole, search(whole))
    built = started(tmp_path)
    folder = built.folder.path
    train_supernet(built)
    said = export_refuses(capfd, monkeypatch, folder)
    assert f"finish it with: widthkit slim {CONFIG.model} " in said
    assert said.endswith(f"--out {folder} --resume\n")
    result = search(built)
    assert "unfinished run" in export_refuses(capfd, monkeypatch, folder)  # the search is done, the trainings are not
    said = here(capfd, monkeypatch, "export", folder).stderr
    line = shlex.split(said.partition("finish it with: ")[2])
    done = here(capfd, monkeypatch, *line[1:])
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "search.json").read_text())["widths"] == result.widths
    one, other = (load_file(path / "slim.safetensors") for path in (folder, whole.folder.path))
    assert all(torch.equal(one[name], other[name]) for name in other)
    done = here(capfd, monkeypatch, "export", folder, "--allow", CONFIG.model)
    assert done.returncode == 0, done.stderr


def test_an_unfinished_search_is_named(tmp_path, capfd, monkeypatch):
    built = started(tmp_path, command="train")
    folder = built.folder.path
    train_supernet(built)
    assert "run widthkit search first" in export_refuses(capfd, monkeypatch, folder)
    search(built)
    (folder / "search.json").unlink()  # as if it had been killed before its end
    said = export_refuses(capfd, monkeypatch, folder)
    line = f"widthkit search {folder} --searcher random --searcher-option n=3 --resume"
    assert f"unfinished search; finish it with: {line}\n" in said
    line = shlex.split(said.partition("finish it with: ")[2])
    assert here(capfd, monkeypatch, *line[1:]).returncode == 0
    done = here(capfd, monkeypatch, "export", folder)
    assert done.returncode == 0, done.stderr


def test_a_search_keeps_its_own_options(tmp_path, capfd, monkeypatch):
    built = started(tmp_path, command="train")
    folder = built.folder.path
    train_supernet(built)
    other = build(CONFIG.changed({"budget": "0.7x", "search_images": 16}), built.folder, say=print, progress=False)
    load_supernet(other)
    search(other)
    assert RunFolder(folder).config().search_images != 16
    searched = RunFolder(folder).searched_config()
    assert (searched.budget, searched.search_images, searched.lr) == ("0.7x", 16, 0.01)
    again = here(capfd, monkeypatch, "search", folder, "--resume", "--budget", "0.7x", "--search-images", "8")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "holds a search with --searcher random, not --searcher " in again.stderr


def test_stages_are_exported_from_their_own_supernets_without_training(tmp_path, capfd, monkeypatch):
    config = CONFIG.changed({"stages": 2, "bins": 4.0, "alpha": 2.0, "epochs": 1})
    built = started(tmp_path, config, command="train")
    folder = built.folder.path
    train_supernet(built)
    result = search(built)
    assert len(result.settings["stages"]) == 2
    before = files(folder)
    done = here(capfd, monkeypatch, "export", folder)
    assert done.returncode == 0, done.stderr
    assert {p for p in files(folder) if p not in before} == {folder / name for name in SLIM_FILES}
    slim = wk.load(folder / "slim", allow=["benchmarks.nets:plain_cnn"])
    assert sum(p.numel() for p in slim.parameters()) == result.params
    (folder / "stage-2" / "supernet" / "checkpoint.safetensors").unlink()
    assert "no trained supernet" in export_refuses(capfd, monkeypatch, folder)
