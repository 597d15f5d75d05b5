"""Every option of a run on the command line: flags, round trips, help, and the names that errors show."""

import pickle
import shlex

import pytest
import typer
from command import here
from typer.testing import CliRunner

import widthkit.cli.main  # noqa: F401  all commands are there then
from widthkit.budget import parse_budget
from widthkit.cli.app import app
from widthkit.cli.generate import as_flag, with_run_options
from widthkit.errors import BudgetError, Option, OptionError, WidthkitError
from widthkit.graph.space import uniform_space
from widthkit.run.command_line import command_line
from widthkit.run.config import RunConfig, run_options
from widthkit.run.folder import RunFolder
from widthkit.testing import small_graph

COMMANDS = ["trace", "space", "train", "search", "slim"]
NOT_OF_A_RUN = {
    "trace": {"--input", "--free-outputs", "--json", "--verbose"},
    "space": {"--input", "--json", "--out"},
    "train": {"--out", "--resume"},
    "search": {"RUN", "--resume"},
    "slim": {"--out", "--resume"},
}
OTHERS = {
    "model": "package.module:factory",
    "model_options": {"depth": 3, "act": "relu", "digits": "3", "nested": [1, {"a": None}]},
    "merges": True,
    "freeze": ["stem.*", "head"],
    "pretrained": True,
    "weights": "/data/my weights.pth",
    "reset_head": True,
    "rank": "taylor",
    "rank_images": 16,
    "data": "folder:/data/my images",
    "data_dir": "/data/a b",
    "image_size": 48,
    "mean": "0.1,0.2,0.3",
    "std": "0.5",
    "limit": 100,
    "augment": True,
    "strategy": "windows",
    "strategy_options": {"n": 5, "share": 0.5, "on": False},
    "recipe": "digits",
    "set": {"final.lr": 0.02, "augment": {"crop": 4}, "mixed_precision": "no"},
    "epochs": 3,
    "batch_size": 7,
    "optimizer": "adamw",
    "lr": 1e-7,
    "weight_decay": 0.0,
    "schedule": "step",
    "clip_grad": "none",
    "mixed_precision": "bf16",
    "device": "cuda:1",
    "seed": 5,
    "k": 4,
    "bins": 2.5,
    "min_width": "8",
    "max_width": "1.5x",
    "divisor": 8,
    "fixed": {"a=b": 16, "conv1": 3},
    "budget": "0.3x,2MB@batch=16",
    "searcher": "coordinate",
    "searcher_options": {"text": "a=b"},
    "search_images": 64,
    "criterion": "accuracy",
    "search_memory": "1MB",
    "stand_alone_epochs": 1,
    "stages": 3,
    "alpha": 1.5,
    "final_epochs": 0,
    "seeds": 2,
    "init": "inherit",
    "distill": True,
    "compare": ["importance"],
    "checkpoint_minutes": 1.0,
    "trackers": ["tensorboard"],
}
"""Every option with another value than its default."""


def parsed(command, line):
    """Read a command line as the command does, and return the options that it was given."""
    small, found = typer.Typer(), {}

    @small.command()
    @with_run_options(command)
    def run(given: dict, out: str = "") -> None:
        found.update(given)

    done = CliRunner().invoke(small, line, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_is_a_field_and_the_other_way_round(command):
    parameters = typer.main.get_command(app).commands[command].params
    shown = {p.opts[0] if p.opts[0].startswith("--") else p.metavar for p in parameters} - {"--help"}
    fields = {option.flag for option in run_options().values() if command in option.commands}
    assert shown - NOT_OF_A_RUN[command] == fields


def test_slim_takes_every_field():
    assert {name for name, option in run_options().items() if "slim" in option.commands} == set(RunConfig.model_fields)


def test_every_field_can_be_set_from_the_command_line():
    config = RunConfig(**OTHERS)
    defaults = RunConfig(model="m", data="d")
    assert all(getattr(config, name) != getattr(defaults, name) for name in RunConfig.model_fields)
    line = shlex.split(command_line("slim", config))[2:]
    assert RunConfig(**parsed("slim", line)) == config


def test_what_is_not_given_is_the_default():
    assert RunConfig(**parsed("slim", ["m", "--data", "d"])) == RunConfig(model="m", data="d")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_meaning_default_and_bounds(command, capfd, monkeypatch):
    done = here(capfd, monkeypatch, command, "--help")
    assert done.returncode == 0
    words = " ".join(done.stdout.replace("│", " ").split())
    for option in run_options().values():
        if command in option.commands:
            assert option.flag in words
            assert option.field.description.split(";")[0][:25] in words
            if isinstance(option.default, (int, float)) and not isinstance(option.default, bool):
                assert f"[default: {option.default}]" in words
    if command == "slim":
        assert "(at least 1)" in words
        assert "Final trainings" in words


@pytest.mark.parametrize(
    ("name", "value", "python", "flag"),
    [
        ("k", 0, "k=0", "--k 0"),
        ("lr", 0.0, "lr=0.0", "--lr 0.0"),
        ("rank_images", 0, "rank_images=0", "--rank-images 0"),
        ("final_epochs", -1, "final_epochs=-1", "--final-epochs -1"),
        ("init", "fresh", "init='fresh'", "--init fresh"),
    ],
)
def test_errors_name_keywords_in_python_and_flags_on_the_command_line(name, value, python, flag, capfd, monkeypatch):
    with pytest.raises(OptionError) as refused:
        RunConfig(model="timm/resnet10t", data="digits", **{name: value})
    assert str(refused.value).startswith(f"{python}: ")
    words = flag.split()
    done = here(capfd, monkeypatch, "slim", "timm/resnet10t", "--data", "digits", "--out", "nowhere", *words)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {flag}: ")
    assert done.stderr.count("\n") == 1


def test_a_message_shows_the_users_text_as_it_is():
    error = OptionError("group '{min_width} k=3': ", Option("min_width", "{k}"), " exceeds ", Option("max_width", "1x"))
    assert str(error) == "group '{min_width} k=3': min_width='{k}' exceeds max_width='1x'"
    assert error.message(as_flag) == "group '{min_width} k=3': --min-width '{k}' exceeds --max-width 1x"


def test_errors_of_a_library_function_reach_the_command_line_with_flags():
    budget, space = parse_budget("0.0001x", small_graph()), uniform_space(small_graph(), min_width="0.5x")
    with pytest.raises(BudgetError, match="or lower min_width") as refused:
        budget.check(space)
    assert refused.value.message(as_flag).endswith("or lower --min-width")


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(OptionError(Option("k", 0), ": too few")))
    assert error.message(as_flag) == "--k 0: too few"
    assert isinstance(error, WidthkitError)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--fix", "conv1"], "--fix 'conv1': write it as GROUP=WIDTH; widthkit space lists the groups"),
        (["--fix", "conv1=wide"], "--fix 'conv1=wide': write it as GROUP=WIDTH"),
        (["--strategy-option", "n"], "--strategy-option 'n': write it as NAME=VALUE"),
        (["--clip-grad", "much"], "--clip-grad much: write a number, or none"),
        (["--k", "few"], "--k"),
    ],
    ids=str,
)
def test_texts_that_cannot_be_read(words, hint, capfd, monkeypatch):
    done = here(capfd, monkeypatch, "slim", "timm/resnet10t", "--data", "digits", "--out", "nowhere", *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert hint in done.stderr


def test_another_option_than_the_runs_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "w.pth").write_bytes(b"weights")
    config = RunConfig(**{**OTHERS, "weights": str(tmp_path / "w.pth")})
    folder.begin(config, "slim", resume=False)
    (tmp_path / "search.json").write_text("{}")
    folder.begin(config, "slim", resume=True)
    with pytest.raises(OptionError) as refused:
        folder.begin(config.changed({"fixed": {"conv1": 4}}), "slim", resume=True)
    assert "fixed={'a=b': 16, 'conv1': 3}, not fixed={'conv1': 4}" in str(refused.value)
    assert "--fix a=b=16 --fix conv1=3, not --fix conv1=4" in refused.value.message(as_flag)
