"""Ask, judge, tell; every judgement is in the journal before anyone hears of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from widthkit.graph import ChannelGraph
from widthkit.search.evaluator import Judgement, Piece
from widthkit.search.journal import Journal
from widthkit.search.result import Trial
from widthkit.search.rounds import judge_round
from widthkit.search.searcher import Searcher, Span


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
    total, count = engine.proposals, 0

    def show(watchers: Sequence[Callable[[Trial, float], None]], trial: Trial) -> None:
        nonlocal count
        count += 1
        progress = min(1.0, count / total) if total else engine.progress
        for watch in watchers:
            watch(trial, progress)

    while not engine.done:
        asked = engine.ask()
        if not asked:
            break
        span = engine.span
        vectors = [{name: int(width) for name, width in proposal.items()} for proposal in asked]
        keys = [key_of(widths, span) for widths in vectors]
        shown = watchers if span is None else ()
        for key, widths in zip(keys, vectors, strict=True):
            if key in known:
                show(shown, trial_of(graph, widths, known[key]))
        part = judge if span is None else judge.at(span)
        for widths, found in judge_new(part, dict(zip(keys, vectors, strict=True)), journal, known):
            show(shown, trial_of(graph, widths, found))
        if span is None:
            trials += [trial_of(graph, widths, known[key]) for key, widths in zip(keys, vectors, strict=True)]
        scores = [known[key].score for key in keys]
        engine.tell(asked, [score if math.isfinite(score) else -math.inf for score in scores])
    return trials


def judge_new(
    judge: Any, vectors: Mapping[str, dict[str, int]], journal: Journal, known: dict[str, Judgement]
) -> Iterator[tuple[dict[str, int], Judgement]]:
    """Judge the width vectors that are not known yet.

    Args:
        judge: As in :func:`run_loop`.
        vectors: Name in the journal (:func:`key_of`) -> width vector.
        journal: Gets every judgement before it is yielded.
        known: Gets them too.

    Yields:
        A new width vector and its judgement, as soon as it is known.
    """
    fresh = [key for key in vectors if key not in known]
    for found in judge_round(judge, [vectors[key] for key in fresh]):
        if isinstance(found, Piece):
            journal.add_piece(found)
            continue
        place, judgement = found
        known[fresh[place]] = judgement
        journal.add(fresh[place], judgement)
        yield vectors[fresh[place]], judgement
    if fresh:
        # A round that a resumed search only repeats leaves the pieces to the one that was interrupted.
        journal.end_round()


def key_of(widths: Mapping[str, int], span: Span | None = None) -> str:
    """Name a judgement in the journal."""
    return json.dumps(widths if span is None else {"span": list(span), "widths": widths}, sort_keys=True)


def trial_of(graph: ChannelGraph, widths: dict[str, int], found: Judgement) -> Trial:
    """Join widths, judgement and costs."""
    return Trial(widths, found.score, found.loss, found.accuracy, graph.macs(widths), graph.params(widths))
