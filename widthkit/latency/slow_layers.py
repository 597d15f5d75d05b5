"""Find the layers because of which a slim network is slower than its MACs suggest."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

ENOUGH = 0.8
"""A network counts as slow if its speed-up is below this share of its MACs ratio."""

_N_SHOWN = 5


@dataclass(frozen=True)
class Layer:
    """The cost of one module without children in one forward pass.

    Args:
        ms: Median time of its calls.
        macs: Multiply-adds of a convolution or linear layer; 0 otherwise.
        elements: Numbers in its output.
    """

    ms: float
    macs: int
    elements: int


@dataclass(frozen=True)
class SlowLayer:
    """A layer whose time has shrunk less than its work.

    Args:
        name: Path of the module.
        dense_ms: Its time in the dense network.
        slim_ms: Its time in the slim network.
        work: Its work in the slim network, divided by that in the dense one. Work is MACs, or numbers in the output of
            a layer without MACs.
        excess_ms: Its time beyond ``work * dense_ms``.
    """

    name: str
    dense_ms: float
    slim_ms: float
    work: float
    excess_ms: float

    def record(self) -> dict[str, Any]:
        """Return the layer as JSON values."""
        return asdict(self)


def is_slow(dense_ms: float, slim_ms: float, dense_macs: int, slim_macs: int) -> bool:
    """Whether a network's speed-up is below 0.8 of its MACs ratio.

    >>> is_slow(10.0, 6.0, 200, 100), is_slow(10.0, 6.5, 200, 100)
    (False, True)
    """
    return dense_ms / slim_ms < ENOUGH * dense_macs / slim_macs


def time_layers(net: nn.Module, x: Tensor, *, repeats: int = 7, warmup: int = 2) -> dict[str, Layer]:
    """Time every module without children in eager forward passes.

    Args:
        net: The network, in eval mode, on the device of ``x``.
        x: A batch of images.
        repeats: Timed passes; the median counts.
        warmup: Passes before them that are not counted.

    Returns:
        Path of a module -> its cost.
    """
    seen: dict[str, list[tuple[Any, Any]]] = {}
    work: dict[str, tuple[int, int]] = {}
    started: dict[str, Any] = {}
    now: Callable[[], Any] = _event if x.is_cuda else time.perf_counter
    milliseconds = _between_events if x.is_cuda else _between_times
    hooks = []

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            started[name] = now()

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            seen.setdefault(name, []).append((started[name], now()))
            work[name] = _work(module, result)

        return hook

    try:
        for name, module in net.named_modules():
            if not any(True for _ in module.children()):
                hooks += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
        # Events are recorded on the stream of the current device, which may not be the network's.
        with torch.inference_mode(), torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            for round_ in range(warmup + repeats):
                if round_ == warmup:
                    seen.clear()
                net(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
    finally:
        for hook in hooks:
            hook.remove()
    times = {name: [milliseconds(start, end) for start, end in pairs] for name, pairs in seen.items()}
    return {name: Layer(_median(values, repeats), *work[name]) for name, values in times.items()}


def slow_layers(dense: Mapping[str, Layer], slim: Mapping[str, Layer]) -> list[SlowLayer]:
    """List the five layers with the largest excess time, largest first.

    >>> slow_layers({"a": Layer(4.0, 100, 10), "b": Layer(2.0, 0, 10)}, {"a": Layer(3.5, 50, 5), "b": Layer(1.0, 0, 5)})
    [SlowLayer(name='a', dense_ms=4.0, slim_ms=3.5, work=0.5, excess_ms=1.5)]
    """
    found = []
    for name in dense.keys() & slim.keys():
        a, b = dense[name], slim[name]
        work = b.macs / a.macs if a.macs else b.elements / max(a.elements, 1)
        excess = b.ms - work * a.ms
        if excess > 0:
            found.append(SlowLayer(name, a.ms, b.ms, work, excess))
    return sorted(found, key=lambda layer: (-layer.excess_ms, layer.name))[:_N_SHOWN]


def describe(layers: list[SlowLayer]) -> str:
    """Return one line of text.

    >>> describe([SlowLayer("layer1.0.bn1", 2.0, 1.8, 0.5, 0.8)])
    'layer1.0.bn1 (2.00 -> 1.80 ms at 50% of its work)'
    """
    return ", ".join(f"{s.name} ({s.dense_ms:.2f} -> {s.slim_ms:.2f} ms at {s.work:.0%} of its work)" for s in layers)


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between_events(start: Any, end: Any) -> float:
    return float(start.elapsed_time(end))


def _between_times(start: float, end: float) -> float:
    return 1000 * (end - start)


def _median(times: list[float], repeats: int) -> float:
    """Return the median over passes; a module that runs several times per pass counts the sum of its calls."""
    calls = max(1, len(times) // repeats)
    return float(statistics.median(sum(times[i : i + calls]) for i in range(0, len(times), calls)))


def _work(module: nn.Module, result: Any) -> tuple[int, int]:
    """Return MACs and number of outputs of one call."""
    if not isinstance(result, Tensor):
        return 0, 0
    elements = result.numel()
    if isinstance(module, nn.Linear):
        return module.weight.numel() * (elements // result.shape[-1]), elements
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.weight.numel() * result.shape[0] * math.prod(result.shape[2:]), elements
    return 0, elements
