"""What sharing weights costs: a supernet's step against the dense network's, in the same run."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from widthkit.bench.files import write
from widthkit.export import export
from widthkit.latency.timing import interleaved, keep_pages
from widthkit.modules.models import create_model
from widthkit.supernet import Supernet, make_supernet


def run(
    models: list[str], sizes: list[int], batch: int, repeats: int, device: str, out: Path | None, keep: bool = True
) -> None:
    """Measure and print the ratio for every model and image size.

    The step is forward and backward of the sum of squares of the outputs, with gradients set to ``None`` before, in
    training mode, at half of every width. ``naive`` is the same sub-network through autograd's own slicing.
    ``keep`` tells the C library to keep freed pages, for all of them alike; see
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
    """Time one model at one size; the ratio is the median over rounds of the two times of one round."""
    net, naive = (_half(name, device) for _ in range(2))
    naive.slices.autograd_below = sys.maxsize
    slim = export(net).train().to(device)
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    calls = {"supernet": _step(net, x), "dense": _step(slim, x), "naive": _step(naive, x)}
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
    net = make_supernet(create_model(name).train(), "ua").to(device).train()
    return net.set_widths({g.name: max(1, g.width // 2) for g in net.space.groups})


def _step(net: nn.Module, x: Tensor) -> Callable[[], object]:
    def step() -> None:
        net.zero_grad(set_to_none=True)
        net(x).square().sum().backward()

    return step
