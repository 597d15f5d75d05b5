"""What a search found: everything that the report draws, as one JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from widthkit.errors import CheckpointError
from widthkit.files import atomic_json

FORMAT = 1


@dataclass(frozen=True)
class Trial:
    """One judged width vector; ``export(net, trial)`` makes its network.

    Args:
        widths: Group name -> width.
        score: What searchers maximise.
        loss: Mean loss over examples and paths.
        accuracy: In the supernet, where there is one.
        macs: Per example.
        params: Of the network.
        path: Which of the strategy's paths was judged best; 0 in results of earlier versions, which did not say.
    """

    widths: dict[str, int]
    score: float
    loss: float
    accuracy: float | None
    macs: int
    params: int
    path: int = 0


@dataclass(frozen=True)
class SearchResult:
    """The outcome of :func:`widthkit.search`.

    Args:
        widths: The best widths inside the budget.
        score: Their score.
        accuracy: Their accuracy in the supernet, where there is one.
        macs: Their MACs per example.
        params: Their parameters.
        budget: As the user wrote it.
        searcher: Its name or class.
        seed: The seed of the search.
        full: Full width, MACs and parameters of the model as given.
        trials: Every judged width vector, in order.
        settings: What else the run was made with.
        measured: One row per memory or latency bound: predicted and measured.
        notes: What people should know about the result.
        units: Group name -> the supernet's units that were judged best for these widths, ascending;
            ``export(net, result)`` takes them. Empty in results of earlier versions.
    """

    widths: dict[str, int]
    score: float
    accuracy: float | None
    macs: int
    params: int
    budget: str
    searcher: str
    seed: int
    full: dict[str, Any]
    trials: list[Trial]
    settings: dict[str, Any] = field(default_factory=dict)
    measured: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    units: dict[str, list[int]] = field(default_factory=dict)

    @property
    def best(self) -> Trial:
        """The trial that the result is."""
        return next(trial for trial in self.trials if trial.widths == self.widths)

    @property
    def pareto(self) -> list[Trial]:
        """The trials that no other beats in both score and MACs, by ascending MACs."""
        front: list[Trial] = []
        for trial in sorted(self.trials, key=lambda t: (t.macs, -t.score)):
            if np.isfinite(trial.score) and (not front or trial.score > front[-1].score):
                front.append(trial)
        return front

    def save(self, path: str | Path) -> Path:
        """Write the result as JSON, atomically, and return the path."""
        target = Path(path)
        atomic_json(target, {"format": FORMAT, **asdict(self), "pareto": [asdict(t) for t in self.pareto]})
        return target

    @classmethod
    def load(cls, path: str | Path) -> SearchResult:
        """Read a result.

        Raises:
            CheckpointError: If the file is missing, damaged, or of another format version.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data.pop("format") != FORMAT:
                raise CheckpointError(f"{path}: another format version; this widthkit reads version {FORMAT}")
            data.pop("pareto", None)
            trials = [_trial(trial) for trial in data.pop("trials")]
            found = TypeAdapter(cls).validate_python(asdict(cls(trials=trials, **data)))
            if not (isinstance(found.full["widths"], dict) and found.full["macs"] > 0):
                raise ValueError("'full' must hold the model's widths and macs")
            return found
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise CheckpointError(f"{path} is damaged at '{where}': {first['msg']}; search again") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is not a search result ({type(error).__name__}: {error})") from error


def _trial(data: dict[str, Any]) -> Trial:
    """Read one trial; JSON has no NaN, so a score that was none comes back from null."""
    return Trial(**{**data, **{key: float("nan") for key in ("score", "loss") if data[key] is None}})
