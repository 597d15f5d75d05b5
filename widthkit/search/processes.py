"""Share work out among the processes that ``torchrun`` or ``accelerate launch`` started."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from widthkit.errors import DataError, ModelError
from widthkit.search.evaluator import Evaluator
from widthkit.search.judging import Judgement
from widthkit.search.sharing import sharing_order
from widthkit.train.launch import join, launched
from widthkit.train.parallel import alone, process_index, processes

T = TypeVar("T")
TrainFn = Callable[[dict[str, int]], float]
"""Trains a network of given widths on its own; returns its accuracy, higher is better."""
Work = Callable[[Sequence[Mapping[str, int]]], Iterator[tuple[int, Judgement]]]
"""Yields the place of each width vector in a list, and its judgement."""


def judge_in_processes(judge: Evaluator, vectors: Sequence[Mapping[str, int]]) -> Iterator[tuple[int, Judgement]]:
    """Judge width vectors inside the supernet; each process judges its share and receives all judgements.

    Args:
        judge: The evaluator of this process.
        vectors: The same list on every process.

    Yields:
        The place of a vector in the list and its judgement, in the same order for any number of processes.

    Raises:
        ModelError: If judging failed on another process.
    """
    # Neighbours in this order share the most and cost about the same, so no process waits for long.
    yield from _in_turns(sharing_order(judge.net, vectors), vectors, judge.judge_many)


def train_in_processes(train: TrainFn, vectors: Sequence[Mapping[str, int]]) -> Iterator[tuple[int, Judgement]]:
    """Train networks on their own, every process its share; otherwise as :func:`judge_in_processes`."""

    def work(mine: Sequence[Mapping[str, int]]) -> Iterator[tuple[int, Judgement]]:
        for place, widths in enumerate(mine):
            with alone():
                accuracy = float(train(dict(widths)))
            yield place, Judgement(accuracy, float("nan"), accuracy)

    yield from _in_turns(list(range(len(vectors))), vectors, work)


def _in_turns(
    order: Sequence[int], vectors: Sequence[Mapping[str, int]], work: Work
) -> Iterator[tuple[int, Judgement]]:
    """Give process ``i`` of ``n`` every n-th vector from the i-th; gather the results after each."""
    n, own = processes(), process_index()
    results = work([vectors[place] for place in order[own::n]])
    if n == 1:
        yield from ((order[place], judgement) for place, judgement in results)
        return
    for start in range(0, len(order), n):
        turn = order[start : start + n]
        judgements, error = _gathered(partial(_next, results, start + own < len(order)))
        # What the others have found out is passed on also where one process fails.
        yield from ((place, j) for place, j in zip(turn, judgements, strict=False) if j is not None)
        if error is not None:
            raise error


def _next(results: Iterator[tuple[int, Judgement]], due: bool) -> Judgement | None:
    return next(results)[1] if due else None


def _gathered(work: Callable[[], T | None]) -> tuple[list[T | None], Exception | None]:
    """Do something on every process; return what all got, in order of the processes, and why one got nothing."""
    error: Exception | None = None
    answer: Any = None
    try:
        answer = work()
    except Exception as caught:
        error = caught
    answers: list[Any] = [None] * processes()
    message = None if error is None else " ".join(f"{error}".split())
    dist.all_gather_object(answers, (answer, message), group=_group_without_timeout(dist.group.WORLD))
    for index, (_, failure) in enumerate(answers):
        if failure is not None and error is None:
            error = ModelError(f"process {index} failed: {failure}")
    return [found for found, _ in answers], error


@lru_cache(maxsize=1)
def _group_without_timeout(world: Any) -> Any:
    """Make a group for plain objects without a timeout: other processes may train for hours."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=100))


def own_device(device: torch.device) -> torch.device:
    """Join the processes that a launcher started, if any; return this one's device of the given kind."""
    return join(device) if launched() else device


def from_first(work: Callable[[], T]) -> T:
    """Return what process 0 gets from ``work``, which the others do not call.

    Raises:
        Exception: What it raises, on every process.
    """
    if processes() == 1:
        return work()
    answer: list[Any] = [None, None]
    if process_index() == 0:
        try:
            answer[0] = work()
        except Exception as error:
            answer[1] = error
    dist.broadcast_object_list(answer, 0, group=_group_without_timeout(dist.group.WORLD))
    if answer[1] is not None:
        raise answer[1]
    return answer[0]  # type: ignore[no-any-return]


def first_of_all(text: str) -> str:
    """Return the first text of all processes that is not empty."""
    if processes() == 1:
        return text
    return next((found for found in _gathered(lambda: text)[0] if found), "")


def check_same_data(identity: str) -> None:
    """Refuse to search where processes hold different supernets or data.

    Raises:
        DataError: If they do.
    """
    if processes() > 1 and len(set(_gathered(lambda: identity)[0])) > 1:
        raise DataError("the processes hold different held-out data; give all of them the same loader, unsharded")
