"""Run a search: ask, judge, tell, and lose at most the evaluation in flight."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from widthkit.budget import Budget, parse_budget, show_count
from widthkit.errors import BudgetError, ModelError, OptionError
from widthkit.graph import ChannelGraph
from widthkit.search.evaluator import Evaluator, Judgement, Loss
from widthkit.search.journal import Journal
from widthkit.search.measured import describe_rows, measure_result, network_of, remarks
from widthkit.search.result import SearchResult, Trial
from widthkit.search.searcher import SEARCHERS, Searcher
from widthkit.supernet import Supernet
from widthkit.train.losses import cross_entropy

Judge = Callable[[Mapping[str, int]], Judgement]
_SAMPLED = 1 << 16
"""Numbers of a held-out batch that tell two data sets apart."""


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
        budget: ``"0.5x"``, ``"2.0GMACs"``, ``"3.1Mparams"``, ``"12MB"``, ``"1.8ms@cpu"``, or several; see
            :func:`widthkit.budget.parse_budget`.
        searcher: Name of a registered searcher.
        loss: The criterion, ``(outputs, targets) -> scalar``; cross entropy by default.
        seed: Seeds the searcher.
        batch_size: Examples per forward pass; batch statistics want many.
        device: Where to judge; the supernet moves there. Its own device by default.
        out: Folder for ``search.json`` and the journal that ``resume`` reads.
        resume: Continue an interrupted search; the result is the same as without the interruption.
        progress: Show a progress bar on a terminal.
        on_trial: Called after every judged width vector with the trial and the progress (0 to 1).
        **options: Options of the searcher.

    Raises:
        BudgetError: If even the narrowest network exceeds the budget.
        CheckpointError: If ``resume`` finds a journal of another search.
        ModelError: If no network inside the budget got a finite score.
    """
    limit = parse_budget(budget, net.graph, lambda widths: network_of(net, widths))
    limit.check(net.space)
    rng = np.random.default_rng(seed)
    engine = make_searcher(searcher, net, limit, rng, options)
    criterion = loss or cross_entropy()
    judge = Evaluator(net, loader, criterion, batch_size=batch_size, device=device)
    settings = {"searcher": searcher, "options": options, "budget": str(limit), "seed": seed}
    journal = Journal(
        Path(out) / "search-journal.jsonl" if out is not None else None, _identity(net, judge, criterion, settings)
    )
    known = journal.read() if resume else {}
    with _show(progress) as shown:
        trials = run_loop(engine, net.graph, judge, journal, known, [f for f in (shown, on_trial) if f])
    result = with_measurements(_result(net, limit, trials, settings), net, limit)
    if out is not None:
        result.save(Path(out) / "search.json")
    return result


def make_searcher(
    name: str, net: Supernet, budget: Budget, rng: np.random.Generator, options: Mapping[str, Any]
) -> Searcher:
    """Build a registered searcher for a supernet's space.

    Raises:
        PluginError: If no searcher has that name.
        OptionError: If it does not take one of the options, or not with that value.
    """
    cls = SEARCHERS.get(name)
    parameters = inspect.signature(cls).parameters
    accepted = [p for p in parameters if p not in ("space", "budget", "rng")]
    unknown = sorted(set(options) - set(accepted))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        shown = f"its options are: {', '.join(accepted)}" if accepted else "it has none"
        raise OptionError(f"searcher '{name}' has no option '{unknown[0]}'; {shown}")
    try:
        return cls(net.space, budget, rng, **options)
    except (TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise OptionError(f"searcher '{name}' cannot use these options ({dict(options)}): {why}") from error


def run_loop(
    engine: Searcher,
    graph: ChannelGraph,
    judge: Judge,
    journal: Journal,
    known: dict[str, Judgement],
    watchers: Sequence[Callable[[Trial, float], None]] = (),
) -> list[Trial]:
    """Ask, judge what is not known yet, tell. Searchers are deterministic, so a replay leads to the same state.

    Args:
        engine: The searcher.
        graph: Prices the width vectors.
        judge: Gives a width vector's judgement.
        journal: Gets every new judgement before anyone else hears of it.
        known: Judgements by width vector as JSON; new ones are put in.
        watchers: Called with every trial and the progress.

    Returns:
        Every trial, in order.
    """
    trials: list[Trial] = []
    while not engine.done:
        asked = engine.ask()
        if not asked:
            break
        scores = []
        for proposal in asked:
            widths = {name: int(width) for name, width in proposal.items()}
            key = json.dumps(widths, sort_keys=True)
            if key not in known:
                known[key] = judge(widths)
                journal.add(key, known[key])
            found = known[key]
            trials.append(
                Trial(widths, found.score, found.loss, found.accuracy, graph.macs(widths), graph.params(widths))
            )
            scores.append(found.score if math.isfinite(found.score) else -math.inf)
            for watch in watchers:
                watch(trials[-1], engine.progress)
        engine.tell(asked, scores)
    return trials


def _result(net: Supernet, budget: Budget, trials: list[Trial], settings: dict[str, Any]) -> SearchResult:
    inside = [t for t in trials if budget.fits(net.graph, t.widths)]
    if not inside:
        raise BudgetError(f"no judged network was inside the budget {budget}; the searcher proposed {len(trials)}")
    finite = [t for t in inside if math.isfinite(t.score)]
    if not finite:
        raise ModelError(
            f"none of the {len(inside)} networks inside the budget has a finite loss; the supernet diverged or the "
            "held-out data holds NaN"
        )
    best = max(finite, key=lambda t: (t.score, -t.macs))
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


def with_measurements(result: SearchResult, net: Supernet, budget: Budget) -> SearchResult:
    """Measure the best network where the budget is in memory or latency, and note what disappoints."""
    rows = measure_result(net, budget, result.widths)
    return replace(result, measured=rows, notes=remarks(rows, result.macs, result.full["macs"]))


def _identity(net: Supernet, judge: Evaluator, loss: Loss, settings: Mapping[str, Any]) -> str:
    """Hash what judgements depend on: settings, space, weights, criterion and held-out data."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode())
    digest.update(repr([(g.name, g.options) for g in net.space.groups]).encode())
    digest.update(repr((net.strategy, getattr(loss, "__qualname__", type(loss).__qualname__))).encode())
    for name, tensor in net.model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    for inputs, targets, n in judge.batches:
        digest.update(f"batch of {n}".encode())
        for leaf in tree_leaves((inputs, targets)):
            if isinstance(leaf, Tensor) and leaf.numel():
                digest.update(_bytes(leaf.reshape(-1)[:: -(-leaf.numel() // _SAMPLED)]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _show(progress: bool) -> AbstractContextManager[Callable[[Trial, float], None] | None]:
    from widthkit.search.progress import SearchBar

    return SearchBar() if progress else nullcontext(None)


def describe(result: SearchResult) -> str:
    """Say for people what was found, at which cost; one line, and one more per note."""
    share = result.macs / result.full["macs"]
    accuracy = "" if result.accuracy is None else f", accuracy in the supernet {result.accuracy:.1%}"
    measured = "".join(f"; {phrase}" for phrase in describe_rows(result.measured))
    notes = "".join(f"\nnote: {note}" for note in result.notes)
    return (
        f"{show_count(result.macs)} MACs ({share:.1%} of the model), {show_count(result.params)} params"
        f"{accuracy}, {len(result.trials)} networks judged{measured}{notes}"
    )
