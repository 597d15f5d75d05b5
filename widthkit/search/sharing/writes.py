"""Operators that write to a tensor: the stand-in then has the new value, and values that others need stay intact."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from widthkit.search.sharing.memo import Held, Unsafe, storage
from widthkit.search.sharing.shared_run import Key, SharedRun, as_operation, common_sharers
from widthkit.search.sharing.stand_in import StandIn
from widthkit.search.sharing.tree import leaves, replace


def write(run: SharedRun, func: Any, args: Any, kwargs: Any, given: Sequence[Tensor], key: Key | None) -> Any:
    """Run an operator that writes.

    Args:
        run: The sub-network's run.
        func: The operator.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        given: The tensors among them, in order.
        key: Names the call, if all arguments have an origin.

    Raises:
        Unsafe: If it writes to several tensors, to the model or its input, or to memory that others see.
    """
    written = [t for t in _written(func, args, kwargs) if isinstance(t, StandIn)]
    if not written:
        return run.run_alone(func, args, kwargs, given)
    target = written[0]
    if len(written) > 1 or len([t for t in given if t is target]) > 1:
        raise Unsafe(f"{func} writes to several tensors at once")
    if target.origin is not None and target.origin.role == "leaf":
        raise Unsafe(f"{func} writes to the model's own tensors or to its input")
    if target.aliases.others(target):
        raise Unsafe(f"{func} writes to a tensor that others are views of")
    if key is not None and _write_shared(run, func, args, kwargs, given, target, key):
        return target
    value = _writable(run, target)
    _run_write(func, args, kwargs, [value if t is target else run.read(t) for t in given], value)
    target.origin, target.held = None, Held(value)
    return target


def _write_shared(
    run: SharedRun, func: Any, args: Any, kwargs: Any, given: Sequence[Any], target: StandIn, key: Key
) -> bool:
    """Give the stand-in the origin of the written value; ``False`` if the call is not shared."""
    memo = run.memo
    if key in memo.operations:
        target.origin = memo.operations[key].outs
        target.held = target.origin.held()  # type: ignore[union-attr]
        return True
    sharers = common_sharers(given, memo.all)
    if not sharers & run.later or torch.Tag.nondeterministic_seeded in func.tags:
        return False
    operation = as_operation(func, args, kwargs)
    value = _writable(run, target)
    _run_write(func, args, kwargs, [value if t is target else t.value() for t in given], value)
    operation.target = next(i for i, t in enumerate(given) if t is target)
    operation.outs = memo.origin(sharers, value, operation)
    memo.operations[key] = operation
    target.origin, target.held = operation.outs, operation.outs.put(value)
    return True


def _run_write(func: Any, args: Any, kwargs: Any, values: Sequence[Tensor], target: Tensor) -> None:
    rest = iter(values)
    args, kwargs = replace((args, kwargs), Tensor, lambda _: next(rest))
    meta = target.size(), target.stride(), target.dtype
    out = func(*args, **kwargs)
    if out is not target or meta != (target.size(), target.stride(), target.dtype):
        raise Unsafe(f"{func} does not return what it writes to, or changes its shape")


def _writable(run: SharedRun, target: StandIn) -> Tensor:
    """Return a value that may be written to: the stand-in's own if nobody else needs it, else a copy."""
    value = target.value()
    memory = storage(value)
    if run.is_read_only(memory):
        raise Unsafe("a view of the model's own tensors or of its input is written to")
    if run.is_needed_elsewhere(memory, target):
        return value.clone()
    if target.origin is not None:
        target.origin.held = _dropped
    return value


def _dropped() -> None:
    """Return ``None``: the value was overwritten."""


@cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    arguments = func._schema.arguments
    return tuple((i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """List the tensors that an operator writes to."""
    found = [args[i] if i < len(args) else kwargs.get(name) for i, name in _written_arguments(func)]
    return leaves(found, Tensor)
