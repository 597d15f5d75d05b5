"""Measure what sharing weights costs: a supernet's training step against that of the dense network, in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.func import functional_call

from widthkit.bench.files import write
from widthkit.export import export
from widthkit.graph import IntArray
from widthkit.latency.timing import interleaved, keep_pages
from widthkit.modules.clone import named_tensors
from widthkit.modules.models import create_model
from widthkit.supernet import Supernet, make_supernet


def run(
    models: list[str], sizes: list[int], batch: int, repeats: int, device: str, out: Path | None, keep: bool = True
) -> None:
    """Measure and print the ratio for every model and image size.

    The step is forward and backward of the sum of squares of the outputs, with gradients set to ``None`` before, in
    training mode, at half of every width. ``naive`` is the same sub-network on slices that autograd makes itself.

    Args:
        models: Names of models.
        sizes: Sides of the images in pixels.
        batch: Images per step.
        repeats: Timed rounds.
        device: Where to measure.
        out: Result file.
        keep: Let the C library keep freed pages, for all networks alike; see
            :func:`widthkit.latency.timing.keep_pages`.
    """
    console = Console()
    rows = []
    kept = keep and keep_pages()
    for name in models:
        for size in sizes:
            row = measure(name, size, batch, repeats, device)
            rows.append(row)
            console.print(
                f"{name} {size}x{size}: supernet {row['supernet_ms']:.1f} ms, dense {row['dense_ms']:.1f} ms, "
                f"ratio {row['ratio']:.3f} (naive slices {row['naive_ratio']:.3f})",
                highlight=False,
            )
    write(out, "step", rows, device, batch=batch, repeats=repeats, pages_kept=kept)


def measure(name: str, size: int, batch: int, repeats: int, device: str) -> dict[str, Any]:
    """Time one model at one size; a ratio is the median over rounds of the two times of one round."""
    net, naive = (_half(name, device) for _ in range(2))
    slim = export(net).train().to(device)
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    calls = {
        "supernet": _step(net, lambda: net(x)),
        "dense": _step(slim, lambda: slim(x)),
        "naive": _step(naive, _naive_forward(naive, x)),
    }
    times = interleaved(calls, repeats=repeats, device=device)
    ratios = {
        kind: statistics.median(a / b for a, b in zip(times[kind], times["dense"], strict=True))
        for kind in ("supernet", "naive")
    }
    return {
        "model": name,
        "size": size,
        **{f"{kind}_ms": 1000 * statistics.median(values) for kind, values in times.items()},
        "ratio": ratios["supernet"],
        "naive_ratio": ratios["naive"],
    }


def _half(name: str, device: str) -> Supernet:
    """Return a supernet of the default strategy at half of every width, on its first path."""
    net = make_supernet(create_model(name).train()).to(device).train()
    return net.set_widths({g.name: max(1, g.width // 2) for g in net.space.groups})


def _naive_forward(net: Supernet, x: Tensor) -> Callable[[], Tensor]:
    """Run the active sub-network the plain way: slice every tensor by autograd, and call the dense network on that."""
    dense = export(net).train().to(x.device)
    tensors, kept = named_tensors(net.model), net.plan().tensors
    return lambda: functional_call(dense, {n: _part(tensor, kept.get(n, {})) for n, tensor in tensors.items()}, (x,))


def _part(tensor: Tensor, dims: Mapping[int, IntArray]) -> Tensor:
    for dim, index in dims.items():
        first, n = int(index[0]), len(index)
        if int(index[-1]) - first + 1 == n:
            tensor = tensor.narrow(dim, first, n)
        else:
            tensor = tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))
    return tensor


def _step(net: nn.Module, forward: Callable[[], Tensor]) -> Callable[[], object]:
    def step() -> None:
        net.zero_grad(set_to_none=True)
        forward().square().sum().backward()

    return step
