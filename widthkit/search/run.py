"""Run a search: ask, judge, tell, and lose at most the evaluation in flight."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from widthkit.budget import Budget, parse_budget, show_count
from widthkit.errors import BudgetError, CheckpointError, OptionError
from widthkit.files import atomic_json
from widthkit.search.evaluator import Evaluator, Judgement, Loss
from widthkit.search.result import SearchResult, Trial
from widthkit.search.searcher import SEARCHERS, Searcher
from widthkit.supernet import Supernet
from widthkit.train.losses import cross_entropy

Judge = Callable[[Mapping[str, int]], Judgement]


def search(
    net: Supernet,
    loader: Iterable[Any],
    budget: str | Sequence[str] | Budget,
    searcher: str = "greedy",
    *,
    loss: Loss | None = None,
    seed: int = 0,
    batch_size: int = 2048,
    device: Any = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_trial: Callable[[Trial, float], None] | None = None,
    **options: Any,
) -> SearchResult:
    """Find the best widths under a budget.

    Args:
        net: A trained supernet.
        loader: Held-out batches ``(inputs, targets)``.
        budget: ``"0.5x"``, ``"2.0GMACs"``, ``"3.1Mparams"``, or several.
        searcher: Name of a registered searcher.
        loss: The criterion, ``(outputs, targets) -> scalar``; cross entropy by default.
        seed: Seeds the searcher.
        batch_size: Examples per forward pass; batch statistics want many.
        device: Where to judge; the supernet's device by default.
        out: Folder for ``search.json`` and the journal that ``resume`` reads.
        resume: Continue an interrupted search; the result is the same as without the interruption.
        progress: Show a progress bar on a terminal.
        on_trial: Called after every judged width vector with the trial and the progress (0 to 1).
        **options: Options of the searcher.

    Raises:
        BudgetError: If even the narrowest network exceeds the budget.
        CheckpointError: If ``resume`` finds a journal of another search.
    """
    limit = parse_budget(budget, net.graph)
    limit.check(net.space)
    judge = Evaluator(net, loader, loss or cross_entropy(), batch_size=batch_size, device=device)
    rng = np.random.default_rng(seed)
    engine = _make_searcher(searcher, net, limit, rng, options)
    settings = {"searcher": searcher, "options": options, "budget": str(limit), "seed": seed}
    journal = Journal(Path(out) / "search-journal.json" if out is not None else None, _identity(net, settings))
    known = journal.read() if resume else {}
    with _show(progress) as shown:
        trials = _loop(engine, net, judge, journal, known, [f for f in (shown, on_trial) if f])
    result = _result(net, limit, trials, settings)
    if out is not None:
        result.save(Path(out) / "search.json")
    return result


def _make_searcher(name: str, net: Supernet, budget: Budget, rng: np.random.Generator, options: Any) -> Searcher:
    cls = SEARCHERS.get(name)
    accepted = [p for p in inspect.signature(cls).parameters if p not in ("space", "budget", "rng")]
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        raise OptionError(f"searcher '{name}' has no option '{unknown[0]}'; its options are: {', '.join(accepted)}")
    return cls(net.space, budget, rng, **options)


def _loop(
    engine: Searcher,
    net: Supernet,
    judge: Judge,
    journal: Journal,
    known: dict[str, Judgement],
    watchers: list[Callable[[Trial, float], None]],
) -> list[Trial]:
    """Replay what is known, judge the rest. Searchers are deterministic, so a replay leads to the same state."""
    trials: list[Trial] = []
    while not engine.done:
        asked = engine.ask()
        if not asked:
            break
        scores = []
        for widths in asked:
            key = json.dumps(widths, sort_keys=True)
            if key not in known:
                known[key] = judge(widths)
                journal.add(key, known[key])
            found = known[key]
            cost = net.graph.macs(widths), net.graph.params(widths)
            trials.append(Trial(dict(widths), found.score, found.loss, found.accuracy, *cost))
            scores.append(found.score if math.isfinite(found.score) else -math.inf)
            for watch in watchers:
                watch(trials[-1], engine.progress)
        engine.tell(asked, scores)
    journal.flush()
    return trials


def _result(net: Supernet, budget: Budget, trials: list[Trial], settings: dict[str, Any]) -> SearchResult:
    inside = [t for t in trials if budget.fits(net.graph, t.widths) and math.isfinite(t.score)]
    if not inside:
        raise BudgetError(f"no judged network was inside the budget {budget}; the searcher proposed {len(trials)}")
    best = max(inside, key=lambda t: (t.score, -t.macs))
    full = {"widths": net.graph.full, "macs": net.graph.macs(), "params": net.graph.params()}
    return SearchResult(
        best.widths,
        best.score,
        best.accuracy,
        best.macs,
        best.params,
        str(budget),
        settings["searcher"],
        settings["seed"],
        full,
        trials,
        {"options": settings["options"], "strategy": repr(net.strategy), "space_size": str(net.space.size)},
    )


def _identity(net: Supernet, settings: Mapping[str, Any]) -> str:
    """Hash what a journal depends on: settings, space and the supernet's weights."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode())
    digest.update(repr([(g.name, g.options) for g in net.space.groups]).encode())
    digest.update(repr(net.strategy).encode())
    for name, tensor in net.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().double().sum().numpy().tobytes())
    return digest.hexdigest()


class Journal:
    """Judgements on disk, so that a killed search replays them.

    Args:
        path: Where to keep them; ``None`` keeps nothing.
        identity: Hash of the search; a journal of another search is refused.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path = path
        self.identity = identity
        self._entries: dict[str, list[float | None]] = {}

    def read(self) -> dict[str, Judgement]:
        """Return the judgements of an earlier run of the same search; nothing if there was none.

        Raises:
            CheckpointError: If the journal is damaged or belongs to another search.
        """
        if self.path is None or not self.path.exists():
            return {}
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            identity, entries = data["identity"], dict(data["entries"])
            found = {k: Judgement(float(s), float(x), None if a is None else float(a)) for k, (s, x, a) in entries.items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path} is damaged ({error}); delete it to search from the start") from error
        if identity != self.identity:
            raise CheckpointError(
                f"{self.path} belongs to another search (other weights, space, budget, searcher or seed); "
                "delete it or choose another folder"
            )
        self._entries = entries
        return found

    def add(self, key: str, judgement: Judgement) -> None:
        """Write one more judgement down."""
        self._entries[key] = [judgement.score, judgement.loss, judgement.accuracy]
        self.flush()

    def flush(self) -> None:
        """Write the journal, atomically."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_json(self.path, {"identity": self.identity, "entries": self._entries})


def _show(progress: bool) -> AbstractContextManager[Callable[[Trial, float], None] | None]:
    from widthkit.search.progress import SearchBar

    return SearchBar() if progress else nullcontext(None)


def describe(result: SearchResult) -> str:
    """One line for people: what was found, at which cost."""
    share = result.macs / result.full["macs"]
    accuracy = "" if result.accuracy is None else f", accuracy in the supernet {result.accuracy:.1%}"
    return (
        f"{show_count(result.macs)} MACs ({share:.1%} of the model), {show_count(result.params)} params"
        f"{accuracy}, {len(result.trials)} networks judged"
    )
