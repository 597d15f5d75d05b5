"""Run one operator, or one whole network, on its own and time it.

Times are robust to a busy machine: several short batches of calls are timed and the least time counts, because other
processes can only add time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from widthkit.graph.program import Program, Slot, TensorSpec, is_floating
from widthkit.latency.conditions import Conditions
from widthkit.latency.kernels import Kernel, argument_names, find_operator, operator_schema
from widthkit.latency.timing import interleaved, keep_pages
from widthkit.trace.recorder import call_model

_BATCH_SECONDS = 1e-3
"""Duration of one batch of calls: long against the clock's resolution, short against a scheduler's time slice."""
_BATCHES = 3
_MOST_CALLS = 256
_IN_PLACE_CALLS = 24
"""In-place operators are repeated fewer times, because values that shrink in every call become denormal, and slow."""
_PASSES = 3
"""Passes of one network in a row; in the first one the caches still hold the weights of another network."""


def kernel_seconds(kernel: Kernel, sizes: Sequence[int], conditions: Conditions) -> float:
    """Time one kernel at given sizes.

    Args:
        kernel: The kernel.
        sizes: A number for every open size.
        conditions: Device and memory format; the kernel itself has number types and batch size.

    Returns:
        Seconds per call.

    Raises:
        RuntimeError: If the operator does not run at these sizes; operators also raise TypeError, ValueError and
            IndexError.
    """
    tensors = [_tensor(_shape(s, sizes), dtype, conditions) for s, dtype in kernel.inputs]
    call = _call(kernel, tensors)
    refresh = _refresher(kernel, tensors)
    with torch.inference_mode():
        return _least_seconds(call, refresh, conditions.device or "cpu", _IN_PLACE_CALLS if refresh else _MOST_CALLS)


def copy_seconds(kernel: Kernel, sizes: Sequence[int], conditions: Conditions) -> float:
    """Time a copy of a kernel's results, as a substitute for an operator that cannot run on its own."""
    tensors = [_tensor(_shape(s, sizes), dtype, conditions) for s, dtype in kernel.outputs]
    with torch.inference_mode():
        return _least_seconds(lambda: [t.clone() for t in tensors], None, conditions.device or "cpu", _MOST_CALLS)


def network_seconds(
    networks: Mapping[str, nn.Module], program: Program, conditions: Conditions, repeats: int = 9
) -> dict[str, float]:
    """Time whole networks in turns, three passes in a row each; the fastest pass counts.

    Args:
        networks: Name -> network. They are moved to the device and cast in place, so pass copies.
        program: The traced run; it has the shapes of the inputs.
        conditions: How to run.
        repeats: Timed rounds.

    Returns:
        Name -> seconds of one pass.
    """
    device = conditions.device or "cpu"
    example = example_inputs(program, conditions)
    passes = {name: _pass(placed(network, conditions), example) for name, network in networks.items()}

    def best(run: Callable[[], object]) -> Callable[[], float]:
        def several() -> float:
            return min(_seconds(run, device) for _ in range(_PASSES))

        return several

    keep_freed_memory(device)
    with torch.inference_mode():
        rounds: dict[str, list[float]] = {name: [] for name in passes}
        calls = {name: _storing(best(run), rounds[name]) for name, run in passes.items()}
        interleaved(calls, repeats=repeats, warmup=1, device=device)
    return {name: min(values[1:]) for name, values in rounds.items()}


def keep_freed_memory(device: str) -> None:
    """On a CPU, let the C library keep freed memory, so that page faults do not disturb the times."""
    if torch.device(device).type == "cpu":
        keep_pages()


def _storing(run: Callable[[], float], into: list[float]) -> Callable[[], object]:
    return lambda: into.append(run())


def clock_of(device: str) -> Callable[[], float]:
    """Return the clock for a device.

    On a CPU with one thread it is the CPU time of that thread: wall time without the time in which other processes ran.
    With more threads, and on other devices, it is wall time.
    """
    return time.thread_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _seconds(run: Callable[[], object], device: str) -> float:
    clock = clock_of(device)
    start = clock()
    run()
    _wait(device)
    return clock() - start


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _least_seconds(run: Callable[[], object], refresh: Callable[[], object] | None, device: str, most: int) -> float:
    run()
    once = min(_seconds(run, device) for _ in range(2))
    n = max(1, min(most, int(_BATCH_SECONDS / max(once, 1e-7))))
    best, clock = float("inf"), clock_of(device)
    for _ in range(_BATCHES):
        if refresh is not None:
            refresh()
        start = clock()
        for _ in range(n):
            run()
        _wait(device)
        best = min(best, (clock() - start) / n)
    return best


def _shape(shape: Sequence[int | str], sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(s if isinstance(s, int) else int(sizes[int(s[1:])]) for s in shape)


def _tensor(shape: tuple[int, ...], dtype: str, conditions: Conditions) -> Tensor:
    """Return values that every operator accepts: positive floats around 1, and integers (indices) of 0."""
    kind: torch.dtype = getattr(torch, dtype)
    device = conditions.device or "cpu"
    if not is_floating(dtype):
        return torch.zeros(shape, dtype=kind, device=device)
    generator = torch.Generator().manual_seed(0)
    tensor = torch.empty(shape).uniform_(0.5, 1.5, generator=generator).to(device=device, dtype=kind)
    return tensor.to(memory_format=torch.channels_last) if conditions.channels_last and len(shape) == 4 else tensor


def _call(kernel: Kernel, tensors: list[Tensor]) -> Callable[[], object]:
    operator = find_operator(kernel.operator)
    names = argument_names(kernel.operator)
    args = [_with_size(n, kernel, _with_tensors(a, tensors), tensors) for n, a in zip(names, kernel.args, strict=False)]
    kwargs = {n: _with_size(n, kernel, _with_tensors(v, tensors), tensors) for n, v in kernel.kwargs}
    device = {"device": tensors[0].device} if kwargs.get("device") is not None else {}
    return lambda: operator(*args, **{**kwargs, **device})


def _with_tensors(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Slot):
        return tensors[value.index]
    if isinstance(value, dict):
        return type(value)((name, _with_tensors(item, tensors)) for name, item in value.items())
    return [_with_tensors(item, tensors) for item in value] if isinstance(value, tuple) else value


def _with_size(name: str, kernel: Kernel, value: Any, tensors: list[Tensor]) -> Any:
    """Insert the arguments that :mod:`widthkit.latency.kernels` removed because they repeat a size."""
    if value is None and name == "groups" and kernel.base.startswith("conv"):
        x, weight = tensors[:2]
        return x.shape[x.ndim - weight.ndim + 1] // weight.shape[1]
    if value is None and name == "normalized_shape" and kernel.base.startswith("layer_norm"):
        return list(tensors[1].shape) if len(tensors) > 1 else [tensors[0].shape[-1]]
    return value


def _refresher(kernel: Kernel, tensors: list[Tensor]) -> Callable[[], object] | None:
    """Return a function that restores the arguments of an in-place operator; ``None`` for other operators."""
    if not operator_schema(kernel.operator).is_mutable or not tensors:
        return None
    kept = [t.clone() for t in tensors]
    return lambda: [t.copy_(k) for t, k in zip(tensors, kept, strict=True)]


def placed(network: nn.Module, conditions: Conditions) -> nn.Module:
    """Move a network to its conditions, in place: device, number type, memory format, eval mode."""
    dtype = getattr(torch, conditions.dtype) if conditions.dtype else None
    network = network.eval().to(device=conditions.device or "cpu", dtype=dtype)
    return network.to(memory_format=torch.channels_last) if conditions.channels_last else network  # type: ignore[call-overload,no-any-return]


def example_inputs(program: Program, conditions: Conditions) -> tuple[Any, ...]:
    """Return inputs like those of the traced run, at the batch size, type and memory format of the conditions."""
    extra = program.extra(conditions.batch)
    tensors = [_tensor(_full(spec, extra), _kind(spec, conditions), conditions) for spec in program.inputs]
    filled: tuple[Any, ...] = tuple(_with_tensors(value, tensors) for value in program.example)
    return filled


def _kind(spec: TensorSpec, conditions: Conditions) -> str:
    return conditions.dtype if conditions.dtype and is_floating(spec.dtype) else spec.dtype


def _full(spec: TensorSpec, extra: int) -> tuple[int, ...]:
    return tuple(round(float(d.form[0]) * d.scale(extra)) for d in spec.dims)


def _pass(network: nn.Module, example: tuple[Any, ...]) -> Callable[[], object]:
    return lambda: call_model(network, example)
