"""Run a search: ask, judge, tell, and lose at most the evaluation in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from widthkit.budget import Budget, parse_budget
from widthkit.errors import OptionError
from widthkit.search.build import history_of, make_searcher
from widthkit.search.evaluator import Evaluator, Judgement, Loss
from widthkit.search.guided import Guidance, GuidedSearch, TrainFn, make_guidance
from widthkit.search.identity import identity_of
from widthkit.search.journal import Journal
from widthkit.search.loop import run_loop
from widthkit.search.measured import network_of
from widthkit.search.near_budget import Fullest
from widthkit.search.outcome import best_result, check_chosen, chosen_result, with_measurements
from widthkit.search.providers import Offer
from widthkit.search.result import SearchResult, Trial
from widthkit.search.rounds import check_same, from_first, launched
from widthkit.search.searcher import Searcher, parts_of
from widthkit.search.top_up import filler, remark
from widthkit.supernet import Supernet
from widthkit.train.losses import cross_entropy
from widthkit.train.parallel import broadcast_module, process_index


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
        train_fn: Trains them: widths -> accuracy (higher is better). Of several processes each trains its share, and
            :func:`~widthkit.train.train` sees one process inside; an ``Accelerator``, ``DistributedDataParallel`` or
            collectives of your own would see all of them and must not be used there.
        **options: Options of the searcher.

    Raises:
        BudgetError: If even the narrowest network exceeds the budget, or the widths that training chose do.
        CheckpointError: If ``resume`` finds a journal of another search.
        ModelError: If no network inside the budget got a finite score.
    """
    if not isinstance(net, Supernet):
        raise OptionError(f"{type(net).__name__} is no supernet, so there are no widths to search; see make_supernet")
    limit = parse_budget(budget, net.graph, lambda widths: network_of(net, widths))
    limit.check(net.space)
    criterion = loss or cross_entropy()
    chosen = net.chosen()
    if chosen is not None:
        check_chosen(net, limit, chosen)
    offer = Offer(net, loader, criterion)

    def build() -> Searcher:
        return make_searcher(searcher, net, limit, np.random.default_rng(seed), options, offer)

    engine = build()
    guidance = make_guidance(score_model, type(engine), evaluations, calibrate, train_fn, score_model_options)
    if guidance is not None and parts_of(engine) > 1:
        raise OptionError(f"{searcher} asks about parts of the data, as no score model can; pass score_model=None")
    settings = {"searcher": searcher, "options": options, "budget": str(limit), "seed": seed}
    if guidance is not None and chosen is None:
        settings |= guidance.settings()
    with launched(device) as place:
        judge = Evaluator(
            net,
            loader,
            criterion,
            batch_size=batch_size,
            parts=parts_of(engine),
            device=place,
            training=training,
            memory=memory,
        )
        broadcast_module(net)
        if chosen is not None:
            result = chosen_result(net, limit, judge, chosen, settings)
        else:
            identity = identity_of(net, judge, criterion, settings)
            check_same(identity)
            first = process_index() == 0
            journal = Journal(Path(out) / "search-journal.jsonl" if out is not None and first else None, identity)
            known = from_first(journal.read) if resume else {}
            judge.recall(from_first(journal.read_pieces) if resume else [])
            with _show(progress and first) as shown:
                watchers = [f for f in (shown, on_trial) if f and first]
                run = _Run(net, limit, judge, journal, known, watchers, settings)
                result = run.plain(engine) if guidance is None else run.guided(build, guidance)
        result = from_first(lambda: with_measurements(result, net, limit))
        if out is not None:
            from_first(lambda: result.save(Path(out) / "search.json"))
    return result


@dataclass(frozen=True)
class _Run:
    """What both ways of searching need."""

    net: Supernet
    limit: Budget
    judge: Evaluator
    journal: Journal
    known: dict[str, Judgement]
    watchers: Sequence[Callable[[Trial, float], None]]
    settings: dict[str, Any]

    def plain(self, engine: Searcher) -> SearchResult:
        """Let the supernet judge every proposal, then fill the budget up."""
        trials = self._loop(engine)
        rest = filler(self.net.space, self.limit, trials, self.settings["seed"])
        if rest is not None:
            trials += self._loop(rest)
        return self._end(self._best(trials), None if rest is None else rest.fullest)

    def guided(self, build: Callable[[], Searcher], guidance: Guidance) -> SearchResult:
        """Let a score model judge, which learns from what the supernet says of few."""
        guide = GuidedSearch(
            guidance, build, self.net.space, self.limit, self.judge, self.journal, self.known, self.watchers
        )
        guided = guide.run(self.settings["seed"])
        return self._end(guided.choose(self._best(guided.trials)), None)

    def _loop(self, engine: Searcher) -> list[Trial]:
        return run_loop(engine, self.net.graph, self.judge, self.journal, self.known, self.watchers)

    def _best(self, trials: list[Trial]) -> SearchResult:
        counts = {name: len(records) for name, records in history_of(self.settings["searcher"], self.net).items()}
        return best_result(self.net, self.limit, trials, {**self.settings, **counts})

    def _end(self, result: SearchResult, fullest: Fullest | None) -> SearchResult:
        why = remark(self.net.space, self.limit, result.widths, fullest)
        if why is not None:
            result.settings["remark"] = why
        return result


def _show(progress: bool) -> AbstractContextManager[Callable[[Trial, float], None] | None]:
    from widthkit.search.progress import SearchBar

    return SearchBar() if progress else nullcontext(None)
