"""Run a search; an interruption loses only what is being judged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from widthkit.budget import Budget, parse_budget
from widthkit.errors import OptionError
from widthkit.search.evaluator import Evaluator
from widthkit.search.identity import identity_of
from widthkit.search.journal import Journal
from widthkit.search.judging import Judging, Loss
from widthkit.search.loop import Loop, Watch
from widthkit.search.measured import network_of
from widthkit.search.outcome import check_chosen, make_result, with_measurements
from widthkit.search.processes import (
    TrainFn,
    check_same_data,
    first_of_all,
    from_first,
    judge_in_processes,
    own_device,
    train_in_processes,
)
from widthkit.search.resources import Resources, history_of, make_searcher
from widthkit.search.result import SearchResult
from widthkit.search.searcher import SEARCHERS, Searcher
from widthkit.search.top_up import remark, top_up
from widthkit.supernet import Supernet
from widthkit.train.losses import cross_entropy
from widthkit.train.modes import model_device
from widthkit.train.parallel import broadcast_module, process_index


def search(
    net: Supernet,
    loader: Iterable[Any],
    budget: str | Sequence[str] | Budget,
    searcher: str | None = None,
    *,
    loss: Loss | None = None,
    seed: int = 0,
    judging: Judging | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool | Watch = True,
    train_fn: TrainFn | None = None,
    **options: Any,
) -> SearchResult:
    """Find the best widths under a budget, among those that use more than 97% of it where the space has any.

    Under ``torchrun`` or ``accelerate launch`` all processes judge, each its share of the candidates. The result is the
    same as with one process, and only the first writes files.

    Args:
        net: A trained supernet; it is judged on the device where it is.
        loader: Held-out batches ``(inputs, targets)``.
        budget: ``"0.5x"``, ``"2.0GMACs"``, ``"3.1Mparams"``, ``"12MB"``, ``"1.8ms@cpu"``, or several; see
            :func:`widthkit.budget.parse_budget`.
        searcher: Name of a registered searcher; by default the one that the installed plug-ins mark as default. A
            supernet whose strategy chooses widths in training needs none: its widths are judged once and returned.
        loss: The criterion, ``(outputs, targets) -> scalar``; cross entropy by default. It gets the batch's inputs too
            if it has a parameter named ``inputs``.
        seed: Seeds the searcher.
        judging: Batch size, memory and mode of judging.
        out: Folder for ``search.json`` and the journal that ``resume`` reads.
        resume: Continue an interrupted search; the result is the same as without the interruption.
        progress: Show a progress bar on a terminal, or a line now and then elsewhere. A function is called with every
            trial and the share of the search that is done, of several processes only in the first.
        train_fn: Trains a network of given widths on its own and returns its accuracy (higher is better), for searchers
            that ask for that. Of several processes each trains its share, and :func:`~widthkit.train.train` sees one
            process inside; an ``Accelerator``, ``DistributedDataParallel`` or collectives of your own would see all of
            them and must not be used there.
        **options: Options of the searcher.

    Returns:
        The result; ``export(net, result)`` makes its network, of the units that were judged best.

    Raises:
        BudgetError: If even the narrowest network exceeds the budget, or the widths that training chose do.
        CheckpointError: If ``resume`` finds a journal of another search.
        ModelError: If no network inside the budget got a finite score.
        OptionError: If the searcher does not take an option, or asks for trainings and there is no ``train_fn``.
        PluginError: If there is no searcher of that name.
    """
    if not isinstance(net, Supernet):
        raise OptionError(f"{type(net).__name__} is no supernet, so there are no widths to search; see make_supernet")
    limits = parse_budget(budget, net.graph, lambda widths: network_of(net, widths))
    limits.check(net.space)
    criterion, judging = loss or cross_entropy(), judging or Judging()
    name = SEARCHERS.default if searcher is None else searcher
    chosen = net.chosen()
    if chosen is not None:
        check_chosen(net, limits, chosen)
    resources, rng = Resources(net, loader, criterion), np.random.default_rng(seed)
    engine = make_searcher(name, resources, limits, rng, options, can_train=train_fn is not None)
    settings = {"searcher": name, "options": options, "budget": str(limits), "seed": seed, "training": judging.training}
    if judging.criterion != "loss":
        settings["criterion"] = judging.criterion
    net.to(own_device(model_device(net)))
    judge = Evaluator(net, loader, criterion, judging)
    broadcast_module(net)
    if chosen is not None:
        result = _judge_chosen(net, limits, judge, settings)
    else:
        with _watchers(progress) as watchers:
            loop = _make_loop(net, judge, settings, out, resume, train_fn, watchers)
            result = _search(net, limits, loop, engine, settings)
        result = _with_note(result, judge)
    result = from_first(lambda: with_measurements(result, net, limits))
    if out is not None:
        from_first(lambda: result.save(Path(out) / "search.json"))
    return result


def _search(net: Supernet, budget: Budget, loop: Loop, engine: Searcher, settings: dict[str, Any]) -> SearchResult:
    """Run the searcher, then top its best network up where it left some of the budget."""
    trials = loop.run(engine)
    choice, rest = engine.choice(), None
    if choice is None:
        rest = top_up(net.space, budget, trials, settings["seed"])
        trials += loop.run(rest) if rest is not None else []
    history = len(history_of(settings["searcher"], net))
    result = make_result(net, budget, trials, {**settings, **({"history": history} if history else {})}, choice)
    result.settings.update(engine.summary())
    why = remark(net.space, budget, result.widths, None if rest is None else rest.fullest)
    if why is not None:
        result.settings["remark"] = why
    return result


def _judge_chosen(net: Supernet, budget: Budget, judge: Evaluator, settings: dict[str, Any]) -> SearchResult:
    """Report what training chose, judged once; there is nothing to search."""
    chosen = net.chosen()
    assert chosen is not None
    widths = {name: len(units) for name, units in chosen.items()}
    trial = Loop(net.graph, judge.judge_many).trial(widths, judge(widths))
    return make_result(net, budget, [trial], {**settings, "searcher": "training", "options": {}})


def _make_loop(
    net: Supernet,
    judge: Evaluator,
    settings: dict[str, Any],
    out: str | Path | None,
    resume: bool,
    train_fn: TrainFn | None,
    watchers: Sequence[Watch],
) -> Loop:
    """Open the journal and read what an interrupted search left there."""
    identity = identity_of(net, judge, settings)
    check_same_data(identity)
    first = process_index() == 0
    journal = Journal(Path(out) / "search-journal.jsonl" if out is not None and first else None, identity)
    return Loop(
        net.graph,
        partial(judge_in_processes, judge),
        None if train_fn is None else partial(train_in_processes, train_fn),
        journal,
        from_first(journal.read) if resume else {},
        watchers if first else (),
    )


def _with_note(result: SearchResult, judge: Evaluator) -> SearchResult:
    why = first_of_all(judge.unshared)
    note = f"candidates were judged one by one, because they cannot share what they have in common: {why}"
    return replace(result, notes=[*result.notes, note]) if why else result


@contextmanager
def _watchers(progress: bool | Watch) -> Iterator[list[Watch]]:
    """Yield the functions that are called with every trial."""
    from widthkit.search.progress_bar import SearchBar

    if callable(progress):
        yield [progress]
    elif not progress or process_index() > 0:
        yield []
    else:
        with SearchBar() as bar:
            yield [bar]
