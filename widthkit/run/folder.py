"""The folder of a run: what lies where, and whether a run may begin, go on or be exported.

=======================  ==============================================================
``run.json``             the options, and the command that started the run
``recipe.yaml``          how its networks are trained, every value
``supernet/``            checkpoint of the supernet's training
``search-options.json``  the search's options
``search.json``          widths, score, history
``stage-N/``             supernet and search of a stage, where there are several
``trials/``              checkpoints of stand-alone trainings that the searcher asked for
``final/``               checkpoints of the final trainings
``slim.safetensors``     the slim network, with ``slim.json``
``results.json``         the table: dense, uniform, searched
=======================  ==============================================================
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from widthkit.errors import CheckpointError, Option, OptionError
from widthkit.files import atomic_json
from widthkit.run.command_line import command_line
from widthkit.run.config import RunConfig
from widthkit.run.kept_recipe import check_not_edited, keep_recipe, kept_options, kept_recipe
from widthkit.run.option import SEARCH, SLIM, TRAIN
from widthkit.run.recipe import Recipe
from widthkit.search import SearchResult
from widthkit.train.runfile import epochs_done

_SEARCHED = (".json", "-journal*")


class RunFolder:
    """The folder of one run.

    Args:
        path: Where the run lives.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config_file(self) -> Path:
        """The run's options."""
        return self.path / "run.json"

    @property
    def search_file(self) -> Path:
        """The search's options."""
        return self.path / "search-options.json"

    @property
    def result_file(self) -> Path:
        """The search's result."""
        return self.path / "search.json"

    @property
    def finished(self) -> bool:
        """Whether the final trainings are done: ``slim.safetensors`` then holds their network."""
        return (self.path / "results.json").exists() and (self.path / "slim.json").exists()

    def stage(self, stage: int, config: RunConfig) -> Path:
        """Return the folder of a stage's search, which is the run's own where there is one stage."""
        return self.path / f"stage-{stage}" if config.stages > 1 else self.path

    def supernet(self, stage: int = 1) -> Path:
        """Return the folder of a stage's supernet."""
        return self.path / "supernet" if stage == 1 else self.path / f"stage-{stage}" / "supernet"

    def begin(self, config: RunConfig, command: str, resume: bool) -> None:
        """Write the run's options; refuse if the folder holds another run.

        Args:
            config: The run's options.
            command: The command that starts it.
            resume: Go on with what is there already.

        Raises:
            OptionError: If it holds another run, or this one and ``resume`` was not asked for, or if the weights' file
                cannot be read.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OptionError(f"{self.path} is a file; ", Option("out"), " needs a folder")
        options = config.of(command)
        if self.config_file.exists() and self._has_results():
            if not resume:
                raise OptionError(
                    f"{self.path} already holds a run; pass ", Option("resume"), " to continue it or another ",
                    Option("out"),
                )  # fmt: skip
            record, before = self._record(), self.config()
            given = {name: getattr(before, name) for name in record["options"]}
            _check_same(self.path, "run", {name: value for name, value in given.items() if name in options}, config)
            check_not_edited(self.path, config)
            # A slim run stays a slim run when it is resumed with train.
            command = SLIM if SLIM in (command, record["command"]) else command
            options = {**given, **options}
        else:
            self.search_file.unlink(missing_ok=True)  # An earlier run that left no result may have left its search's.
        keep_recipe(self.path, self.recipe(config, begins=True))
        record = {"format": 1, "command": command, "options": options}
        if config.weights is not None:
            record["weights_sha256"] = _digest(config.weights)
        atomic_json(self.config_file, record)

    def recipe(self, config: RunConfig, *, begins: bool = False) -> Recipe:
        """Return the recipe of the run that the folder holds, with the options' values; the options' if it holds none.

        Args:
            config: The options.
            begins: A run may begin here; what an earlier one has left counts only if it has results.

        Raises:
            OptionError: If an option makes no sense.
            CheckpointError: If the run's recipe is damaged.
        """
        goes_on = self.config_file.exists() and (not begins or self._has_results())
        return kept_recipe(self.path, config) if goes_on else config.resolved()

    def config(self) -> RunConfig:
        """Read the run's options.

        Raises:
            CheckpointError: If there are none or they are damaged.
        """
        options = self._record()["options"]
        return _read_config({**kept_options(self.path), **options}, self.config_file)

    def begin_search(self, config: RunConfig, resume: bool) -> None:
        """Write the search's options; refuse if the folder holds another search.

        Raises:
            OptionError: If there is a search already and ``resume`` was not asked for, or if it had other options.
        """
        earlier = self._has_search()
        if earlier and not resume:
            raise OptionError(
                f"{self.path} already holds a search; pass ", Option("resume"),
                " to continue it or delete search*.json* and stage-*",
            )  # fmt: skip
        if earlier and self.search_file.exists():
            _check_same(self.path, "search", self.searched_config().of(SEARCH), config)
        atomic_json(self.search_file, {"format": 1, "options": config.of(SEARCH)})

    def searched_config(self) -> RunConfig:
        """Read the run's options together with those of its search.

        Raises:
            CheckpointError: If there was no search, or the options are damaged.
        """
        if not self.search_file.exists():
            raise CheckpointError(f"{self.path} holds no search result; run widthkit search first")
        options = _read_record(self.search_file)["options"]
        return _read_config({**self._record()["options"], **options}, self.search_file)

    def result(self) -> SearchResult:
        """Read the search's result.

        Raises:
            CheckpointError: If there is none, if it is unfinished, or if it is damaged.
        """
        config = self.searched_config()
        if not self.result_file.exists():
            raise CheckpointError(
                f"{self.path} holds an unfinished search; finish it with: {self._how(SEARCH, config)}"
            )
        return SearchResult.load(self.result_file)

    def check_weights(self, config: RunConfig, *, begins: bool = False) -> None:
        """Refuse to go on where the file of trained weights is not the one with which the run began.

        Args:
            config: The run's options.
            begins: A run may begin here; what an earlier one has left counts only if it has results.

        Raises:
            OptionError: If so, or if it cannot be read.
            CheckpointError: If the run's options are damaged.
        """
        if config.weights is None or not self.config_file.exists() or (begins and not self._has_results()):
            return
        record = self._record()
        before = record.get("weights_sha256")
        if record["options"].get("weights") == config.weights and before != _digest(config.weights):
            raise OptionError(
                f"{config.weights} has changed since the run in {self.path} began; restore it, or start another run"
            )

    def check_trained(self, config: RunConfig, stage: int = 1) -> None:
        """Refuse to go on without a trained supernet.

        Args:
            config: The run's options.
            stage: The supernet's stage.

        Raises:
            CheckpointError: If there is none, or if its training was interrupted; the line says how to finish it.
        """
        done, epochs = epochs_done(self.supernet(stage)), self.recipe(config).supernet.epochs
        if done == 0 and epochs:
            raise CheckpointError(f"{self.path} holds no trained supernet; run widthkit train first")
        if done < epochs:
            command = self._record()["command"]
            searching = stage > 1 and command == TRAIN
            raise CheckpointError(
                f"the supernet in {self.supernet(stage)} has {done} of {epochs} epochs; finish it with: "
                f"{self._how(SEARCH, config) if searching else self._how(command, self.config())}"
            )

    def check_not_interrupted(self) -> None:
        """Refuse to go on with a run whose command was to do more than it has done.

        Raises:
            CheckpointError: If so; the line says how to finish it.
        """
        if self._record()["command"] == SLIM and not self.finished:
            raise CheckpointError(
                f"{self.path} holds an unfinished run; finish it with: {self._how(SLIM, self.config())}"
            )

    def _how(self, command: str, config: RunConfig) -> str:
        if command == SEARCH:
            return command_line(command, config, [str(self.path)], ["--resume"])
        return command_line(command, config, last=["--out", str(self.path), "--resume"])

    def _record(self) -> dict[str, Any]:
        if not self.config_file.exists():
            raise CheckpointError(f"{self.path} holds no run (no run.json); start one with widthkit train")
        return _read_record(self.config_file)

    def _has_results(self) -> bool:
        """Whether anything beside the options is here that another run would mix with."""
        return any(self.path.glob("*/**/*.safetensors")) or self._has_search()

    def _has_search(self) -> bool:
        """Whether anything is here that a search has found; its options alone are nothing."""
        return any(any(self.path.glob(f"{place}search{kind}")) for place in ("", "stage-*/") for kind in _SEARCHED)


def _check_same(path: Path, what: str, before: Mapping[str, Any], config: RunConfig) -> None:
    for name, value in before.items():
        now = getattr(config, name)
        if now != value:
            raise OptionError(
                f"{path} holds a {what} with ", Option(name, value), ", not ", Option(name, now),
                "; use the same options to resume",
            )  # fmt: skip


def _digest(file: str) -> str:
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError as error:
        raise OptionError(Option("weights", file), f" cannot be read: {error.strerror or error}") from error


def _read_record(path: Path) -> dict[str, Any]:
    """Read a file of options.

    Raises:
        CheckpointError: If it is damaged.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(record, dict) or not isinstance(record.get("options"), dict):
        raise _damaged(path, "no options")
    return record


def _read_config(options: Mapping[str, Any], path: Path) -> RunConfig:
    try:
        return RunConfig(**options)
    except OptionError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, why: object) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({' '.join(str(why).split())[:120]}); start another run")
