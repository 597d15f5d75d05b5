"""Judge the width vectors of one round, over all processes that were launched together."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch.distributed as dist

from widthkit.errors import DataError, ModelError
from widthkit.search.evaluator import Judgement, Piece
from widthkit.train.launch import join
from widthkit.train.modes import checked_device
from widthkit.train.parallel import process_index, processes

T = TypeVar("T")


def judge_round(judge: Any, vectors: Sequence[Mapping[str, int]]) -> Iterator[tuple[int, Judgement] | Piece]:
    """Judge width vectors; every process takes its share, and all hear of every judgement.

    Args:
        judge: Gives a width vector's judgement; if it has a method ``many``
            (:meth:`~widthkit.search.evaluator.Evaluator.many`), that judges them together; one with ``events`` also
            tells what is known of vectors whose judgement must wait.
        vectors: The same list on every process.

    Yields:
        The place of a vector in the list and its judgement, as soon as it is known, in the same order for any number of
        processes; and, at any time, pieces of judgements to come.

    Raises:
        ModelError: If judging failed on another process.
    """
    n = processes()
    # What a process has found out so far may change its order, and all must share out the same one.
    order = from_first(lambda: judge.order(vectors) if hasattr(judge, "order") else list(range(len(vectors))))
    # Neighbours in this order share the most and cost about the same, so nobody waits for long.
    mine = order[process_index() :: n]
    own = _judged(judge, vectors, mine)
    if n == 1:
        yield from own
        return
    # Pieces come when they come; judgements are handed on in turns, as if there were none.
    waiting: list[list[tuple[int, Judgement]]] = [[] for _ in range(n)]
    due = [list(order[i::n]) for i in range(n)]
    while any(due):
        answers, error = _gathered(lambda: next(own, None))
        for index, found in enumerate(answers):
            if isinstance(found, Piece):
                yield found
            elif found is not None:
                waiting[index].append(found)
        if error is not None:
            # What the others have found out must not be lost.
            yield from itertools.chain(*waiting)
            raise error
        while any(due) and all(w or not d for w, d in zip(waiting, due, strict=True)):
            for w, d in zip(waiting, due, strict=True):
                if d:
                    d.pop()
                    yield w.pop(0)


def _judged(
    judge: Any, vectors: Sequence[Mapping[str, int]], mine: Sequence[int]
) -> Iterator[tuple[int, Judgement] | Piece]:
    if hasattr(judge, "many"):
        for found in getattr(judge, "events", judge.many)([vectors[i] for i in mine]):
            yield found if isinstance(found, Piece) else (mine[found[0]], found[1])
    else:
        for i in mine:
            yield i, judge(vectors[i])


def _gathered(work: Callable[[], T]) -> tuple[list[T | None], Exception | None]:
    """Do something on every process; return what all got, in order of the processes, and why one got nothing."""
    error: Exception | None = None
    answer: Any = None
    try:
        answer = work()
    except Exception as caught:
        error = caught
    answers: list[Any] = [None] * processes()
    message = None if error is None else " ".join(f"{error}".split())
    dist.all_gather_object(answers, (answer, message), group=_patient(dist.group.WORLD))
    for index, (_, failure) in enumerate(answers):
        if failure is not None and error is None:
            error = ModelError(f"process {index} failed: {failure}")
    return [found for found, _ in answers], error


@lru_cache(maxsize=1)
def _patient(world: Any) -> Any:
    """Make a group for plain objects that waits as long as it takes: other processes may train for hours."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=100))


@contextmanager
def launched(device: Any) -> Iterator[Any]:
    """Join the processes that ``torchrun`` or ``accelerate launch`` started, if any; yields the device to use."""
    if processes() == 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    yield join(checked_device(device))


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
    dist.broadcast_object_list(answer, 0, group=_patient(dist.group.WORLD))
    if answer[1] is not None:
        raise answer[1]
    return answer[0]  # type: ignore[no-any-return]


def check_same(identity: str) -> None:
    """Refuse to search where processes hold different supernets or data.

    Raises:
        DataError: If they do.
    """
    if processes() > 1 and len(set(_gathered(lambda: identity)[0])) > 1:
        raise DataError("the processes hold different held-out data; give all of them the same loader, unsharded")
