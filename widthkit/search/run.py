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
from widthkit.graph import ChannelGraph, IntArray
from widthkit.search.band import BAND
from widthkit.search.evaluator import Evaluator, Judgement, Loss
from widthkit.search.fill import best_inside, filler, remark
from widthkit.search.guided import GuidedSearch, TrainFn, make_guidance
from widthkit.search.journal import Journal
from widthkit.search.measured import describe_rows, measure_result, network_of, remarks
from widthkit.search.providers import Offer, provided
from widthkit.search.result import SearchResult, Trial
from widthkit.search.rounds import check_same, from_first, judge_round, launched
from widthkit.search.searcher import SEARCHERS, Searcher
from widthkit.supernet import Supernet
from widthkit.train.losses import cross_entropy
from widthkit.train.parallel import broadcast_module, process_index

KEPT = ("options", "history", "score_model", "score_model_options", "evaluations", "calibrate")
"""Settings that results show."""
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
    training: bool = False,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    memory: str | int = "2GB",
    on_trial: Callable[[Trial, float], None] | None = None,
    score_model: str | None = "auto",
    score_model_options: Mapping[str, Any] | None = None,
    evaluations: int | None = None,
    calibrate: int = 0,
    train_fn: TrainFn | None = None,
    **options: Any,
) -> SearchResult:
    """Find the best widths under a budget, among those that use more than 97% of it where the space has any.

    Under ``torchrun`` or ``accelerate launch`` all processes judge, each its share of the candidates; the result is the
    same as with one process, and only the first writes files.

    Args:
        net: A trained supernet.
        loader: Held-out batches ``(inputs, targets)``.
        budget: ``"0.5x"``, ``"2.0GMACs"``, ``"3.1Mparams"``, ``"12MB"``, ``"1.8ms@cpu"``, or several; see
            :func:`widthkit.budget.parse_budget`.
        searcher: Name of a registered searcher. A supernet whose strategy chooses widths in training needs none: its
            widths are judged once and returned, and ``settings["units"]`` names the units.
        loss: The criterion, ``(outputs, targets) -> scalar``; cross entropy by default.
        seed: Seeds the searcher.
        batch_size: Examples per forward pass; batch statistics want many.
        device: Where to judge; the supernet moves there. Its own device by default.
        training: Judge in training mode, for models that return their losses only then, such as detectors.
        out: Folder for ``search.json`` and the journal that ``resume`` reads.
        resume: Continue an interrupted search; the result is the same as without the interruption.
        progress: Show a progress bar on a terminal.
        memory: Most memory for what candidates that are judged together share, such as ``"2GB"``.
        on_trial: Called after every judged width vector with the trial and the progress (0 to 1); of several processes
            only in the first.
        score_model: Name of a registered score model: the searcher then sees its predictions, and the supernet judges
            few networks, where they help most. ``None`` lets the supernet judge every proposal. ``"auto"`` takes the
            default model for searchers that compare scores.
        score_model_options: Options of the model.
        evaluations: With a score model, how many networks the supernet judges; by default as many as the searcher alone
            would propose, but at most 256.
        calibrate: With a score model, how many networks are trained on their own, chosen by design.
        train_fn: Trains them: widths -> accuracy (higher is better).
        **options: Options of the searcher.

    Raises:
        BudgetError: If even the narrowest network exceeds the budget, or the widths that training chose do.
        CheckpointError: If ``resume`` finds a journal of another search.
        ModelError: If no network inside the budget got a finite score.
    """
    limit = parse_budget(budget, net.graph, lambda widths: network_of(net, widths))
    limit.check(net.space)
    rng = np.random.default_rng(seed)
    criterion = loss or cross_entropy()
    chosen = net.chosen()
    if chosen is not None:
        check_chosen(net, limit, chosen)
    engine = make_searcher(searcher, net, limit, rng, options, Offer(net, loader, criterion))
    guidance = make_guidance(score_model, type(engine), evaluations, calibrate, train_fn, score_model_options)
    settings = {"searcher": searcher, "options": options, "budget": str(limit), "seed": seed}
    if guidance is not None and chosen is None:
        settings |= guidance.settings()
    with launched(device) as place:
        judge = Evaluator(net, loader, criterion, batch_size=batch_size, device=place, training=training, memory=memory)
        broadcast_module(net)
        first = process_index() == 0
        if chosen is not None:
            result = _policy_result(net, limit, judge, chosen, settings)
        else:
            identity = _identity(net, judge, criterion, settings)
            check_same(identity)
            journal = Journal(Path(out) / "search-journal.jsonl" if out is not None and first else None, identity)
            known = from_first(journal.read) if resume else {}
            with _show(progress and first) as shown:
                watchers = [f for f in (shown, on_trial) if f and first]
                rest, guided = None, None
                if guidance is not None:

                    def again() -> Searcher:
                        draws = np.random.default_rng(seed)
                        return make_searcher(searcher, net, limit, draws, options, Offer(net, loader, criterion))

                    guide = GuidedSearch(guidance, again, net.space, limit, judge, journal, known, watchers)
                    guided = guide.run(seed)
                    trials = guided.trials
                else:
                    trials = run_loop(engine, net.graph, judge, journal, known, watchers)
                    rest = filler(net.space, limit, trials, seed)
                    if rest is not None:
                        trials += run_loop(rest, net.graph, judge, journal, known, watchers)
            settings.update({name: len(records) for name, records in history_of(searcher, net).items()})
            result = _result(net, limit, trials, settings)
            if guided is not None:
                result = guided.choose(result)
            why = remark(net.space, limit, result.widths, rest.fullest if rest is not None else None)
            if why is not None:
                result.settings["remark"] = why
        result = from_first(lambda: with_measurements(result, net, limit))
        if out is not None:
            from_first(lambda: result.save(Path(out) / "search.json"))
    return result


def make_searcher(
    name: str,
    net: Supernet,
    budget: Budget,
    rng: np.random.Generator,
    options: Mapping[str, Any],
    offer: Offer | None = None,
) -> Searcher:
    """Build a registered searcher for a supernet's space, with what it asks for of an offer.

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
        return cls(net.space, budget, rng, **options, **provided(cls, offer or Offer(net), options))
    except (TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise OptionError(f"searcher '{name}' cannot use these options ({dict(options)}): {why}") from error


def history_of(name: str, net: Supernet) -> dict[str, Any]:
    """Return the widths that trained best, if a searcher asks for them: its result then depends on them."""
    wanted = "history" in inspect.signature(SEARCHERS.get(name)).parameters
    return {"history": net.width_history.records} if wanted else {}


def run_loop(
    engine: Searcher,
    graph: ChannelGraph,
    judge: Any,
    journal: Journal,
    known: dict[str, Judgement],
    watchers: Sequence[Callable[[Trial, float], None]] = (),
) -> list[Trial]:
    """Ask, judge what is not known yet, tell. Searchers are deterministic, so a replay leads to the same state.

    Args:
        engine: The searcher.
        graph: Prices the width vectors.
        judge: Gives a width vector's judgement; see :func:`~widthkit.search.rounds.judge_round`.
        journal: Gets every new judgement before anyone else hears of it.
        known: Judgements by width vector as JSON; new ones are put in.
        watchers: Called with every trial and the progress.

    Returns:
        Every trial on all of the data, in order.
    """
    trials: list[Trial] = []
    while not engine.done:
        asked = engine.ask()
        if not asked:
            break
        fraction = engine.fraction
        vectors = [{name: int(width) for name, width in proposal.items()} for proposal in asked]
        keys = [_key(widths, fraction) for widths in vectors]
        fresh = {key: widths for key, widths in zip(keys, vectors, strict=True) if key not in known}
        shown = watchers if fraction == 1 else ()
        for key, widths in zip(keys, vectors, strict=True):
            if key in known:
                _tell(shown, _trial(graph, widths, known[key]), engine.progress)
        names = list(fresh)
        for place, found in judge_round(judge if fraction == 1 else judge.at(fraction), list(fresh.values())):
            known[names[place]] = found
            journal.add(names[place], found)
            _tell(shown, _trial(graph, fresh[names[place]], found), engine.progress)
        if fraction == 1:
            trials += [_trial(graph, widths, known[key]) for key, widths in zip(keys, vectors, strict=True)]
        scores = [known[key].score for key in keys]
        engine.tell(asked, [score if math.isfinite(score) else -math.inf for score in scores])
    return trials


def check_chosen(net: Supernet, budget: Budget, chosen: Mapping[str, IntArray]) -> None:
    """Refuse a budget that the widths chosen in training exceed.

    Raises:
        BudgetError: If so.
    """
    widths = {name: len(units) for name, units in chosen.items()}
    if not budget.fits(net.graph, widths):
        macs, params = net.graph.macs(widths), net.graph.params(widths)
        raise BudgetError(
            f"training chose widths of {show_count(macs)} MACs and {show_count(params)} params, which exceeds the "
            f"budget {budget}; train again for this budget"
        )


def _policy_result(
    net: Supernet, budget: Budget, judge: Any, chosen: Mapping[str, IntArray], settings: dict[str, Any]
) -> SearchResult:
    """Report what training chose, judged once; there is nothing to search."""
    widths = {name: len(units) for name, units in chosen.items()}
    found = judge(widths)
    macs, params = net.graph.macs(widths), net.graph.params(widths)
    trial = Trial(widths, found.score, found.loss, found.accuracy, macs, params)
    result = _result(net, budget, [trial], {**settings, "searcher": "training", "options": {}})
    result.settings["units"] = {name: units.tolist() for name, units in chosen.items()}
    return result


def _key(widths: Mapping[str, int], fraction: float) -> str:
    """Name a judgement in the journal."""
    return json.dumps(widths if fraction == 1 else {"fraction": fraction, "widths": widths}, sort_keys=True)


def _trial(graph: ChannelGraph, widths: dict[str, int], found: Judgement) -> Trial:
    return Trial(widths, found.score, found.loss, found.accuracy, graph.macs(widths), graph.params(widths))


def _tell(watchers: Sequence[Callable[[Trial, float], None]], trial: Trial, progress: float) -> None:
    for watch in watchers:
        watch(trial, progress)


def _result(net: Supernet, budget: Budget, trials: list[Trial], settings: dict[str, Any]) -> SearchResult:
    inside = [t for t in trials if budget.fits(net.graph, t.widths)]
    if not inside:
        raise BudgetError(f"no judged network was inside the budget {budget}; the searcher proposed {len(trials)}")
    best = best_inside(net.space, budget, inside, BAND) or best_inside(net.space, budget, inside)
    if best is None:
        raise ModelError(
            f"none of the {len(inside)} networks inside the budget has a finite loss; the supernet diverged or the "
            "held-out data holds NaN"
        )
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
        {
            **{name: value for name, value in settings.items() if name in KEPT},
            "strategy": repr(net.strategy),
            "space_size": str(net.space.size),
        },
    )


def with_measurements(result: SearchResult, net: Supernet, budget: Budget) -> SearchResult:
    """Measure the best network where the budget is in memory or latency, and note what disappoints."""
    rows = measure_result(net, budget, result.widths)
    return replace(result, measured=rows, notes=remarks(rows, result.macs, result.full["macs"]))


def _identity(net: Supernet, judge: Evaluator, loss: Loss, settings: Mapping[str, Any]) -> str:
    """Hash what judgements depend on: settings, space, weights, criterion and held-out data."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode())
    digest.update(repr([(g.name, g.options) for g in net.space.groups]).encode())
    digest.update(repr(history_of(settings["searcher"], net)).encode())
    digest.update(repr((net.strategy, getattr(loss, "__qualname__", type(loss).__qualname__))).encode())
    for name, tensor in net.state_dict().items():
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
    diverged = sum(not math.isfinite(trial.score) for trial in result.trials)
    lost = f", {diverged} of them without a finite loss" if diverged else ""
    measured = "".join(f"; {phrase}" for phrase in describe_rows(result.measured))
    notes = "".join(f"\nnote: {note}" for note in result.notes)
    return (
        f"{show_count(result.macs)} MACs ({share:.1%} of the model), {show_count(result.params)} params"
        f"{accuracy}, {len(result.trials)} networks judged{lost}{measured}"
        + (f"; {result.settings['remark']}" if "remark" in result.settings else "")
        + notes
    )
