"""Measure the latency of dense and slim networks: speed-up beside the MACs ratio."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from widthkit.bench.files import write
from widthkit.bench.networks import Comparison
from widthkit.budget import show_count
from widthkit.errors import OptionError, close_matches
from widthkit.export.writer import DTYPES
from widthkit.latency.slow_layers import describe, is_slow, slow_layers, time_layers
from widthkit.latency.timing import interleaved, keep_pages
from widthkit.modules.models import input_channels
from widthkit.train.modes import checked_device

MODES = ("eager", "compiled", "graphs")


@dataclass(frozen=True)
class Setting:
    """How networks are run.

    Args:
        device: Where.
        dtype: ``fp32``, ``fp16``, ``bf16``.
        channels_last: Channels last in memory.
        size: Side of the images in pixels.
        repeats: Timed rounds; medians are reported.
    """

    device: str = "cpu"
    dtype: str = "fp32"
    channels_last: bool = False
    size: int = 224
    repeats: int = 15


def run(
    models: Sequence[str],
    comparison: Comparison,
    batches: Sequence[int],
    modes: Sequence[str],
    setting: Setting,
    out: Path | None,
) -> None:
    """Measure and print; networks of one model take turns in one process.

    Args:
        models: Dense models by name.
        comparison: What is measured beside each of them.
        batches: Batch sizes.
        modes: Of ``eager``, ``compiled``, ``graphs`` (CUDA graphs).
        setting: How networks are run.
        out: Result file.

    Raises:
        OptionError: If a mode or dtype is unknown or not possible here, or a saved network or widths are of another
            model.
    """
    check(modes, setting)
    if len(models) > 1 and (comparison.slim is not None or comparison.widths is not None):
        raise OptionError(f"--slim and --widths are of one model; pass one --model, not {', '.join(models)}")
    kept = keep_pages()
    rows = []
    for name in models:
        nets, macs = comparison.networks(name, setting.size)
        for batch in batches:
            for mode in modes:
                found = measure(nets, macs, batch, mode, setting)
                rows += [{"model": name, **row} for row in found]
                show(name, found, batch, mode, setting)
    used = {"budget": comparison.budget, "divisor": comparison.divisor, "dtype": setting.dtype}
    used |= {"channels_last": setting.channels_last, "size": setting.size, "repeats": setting.repeats}
    write(out, "latency", rows, setting.device, **used, pages_kept=kept)


def check(modes: Sequence[str], setting: Setting) -> None:
    """Refuse what cannot be measured.

    Raises:
        OptionError: Naming the option.
    """
    device = checked_device(setting.device)
    for mode in modes:
        if mode not in MODES:
            raise OptionError(f"unknown mode '{mode}': {close_matches(mode, MODES)}")
        if mode == "graphs" and (device is None or device.type != "cuda"):
            raise OptionError("mode 'graphs' replays CUDA graphs; pass --device cuda:0 or another --mode")
    if setting.dtype not in DTYPES:
        raise OptionError(f"unknown dtype '{setting.dtype}': {close_matches(setting.dtype, DTYPES)}")


def measure(
    nets: Mapping[str, nn.Module], macs: Mapping[str, int], batch: int, mode: str, setting: Setting
) -> list[dict[str, Any]]:
    """Time the networks in turns; return one row per network, the dense one first."""
    channels = input_channels(nets["dense"])
    dtype = DTYPES[setting.dtype]
    x = torch.randn(batch, channels, setting.size, setting.size, generator=torch.Generator().manual_seed(0))
    x = x.to(setting.device, dtype)
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    ready = {n: net.to(setting.device, dtype).to(memory_format=layout).eval() for n, net in nets.items()}  # type: ignore[call-overload]
    # Networks of one class share a cache of compiled code. When it is full (eight entries, unless a library such as
    # timm has raised that), torch runs eagerly and only logs it. So every measurement starts with an empty cache.
    torch.compiler.reset()
    with torch.inference_mode(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        calls = {name: _call(net, x, mode) for name, net in ready.items()}
        times = interleaved(calls, repeats=setting.repeats, device=setting.device)
    rows = []
    for name, values in times.items():
        ratio = statistics.median(d / v for d, v in zip(times["dense"], values, strict=True))
        ms = 1000 * statistics.median(values)
        row: dict[str, Any] = {"network": name, "batch": batch, "mode": mode, "ms": ms, "macs": macs[name]}
        row |= {"speed_up": ratio, "macs_ratio": macs["dense"] / macs[name]}
        row["slow"] = is_slow(ratio, 1.0, macs["dense"], macs[name])
        rows.append(row)
    _name_slow_layers(rows, ready, x)
    return rows


def _call(net: nn.Module, x: Tensor, mode: str) -> Callable[[], object]:
    if mode == "compiled":
        # Without dynamic=False the second network of a class gets kernels of dynamic shapes.
        compiled = torch.compile(net, dynamic=False)
        return lambda: compiled(x)
    if mode == "graphs":
        return _captured(net, x)
    return lambda: net(x)


def _captured(net: nn.Module, x: Tensor) -> Callable[[], object]:
    """Capture a forward pass as a CUDA graph; a call replays it on the same memory."""
    with torch.cuda.device(x.device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose kernels and allocate their workspaces before the capture
                net(x)
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            result = net(x)
    # The result's memory belongs to the captured graph and must outlive it.
    keep = (x, result)
    return lambda: (captured.replay(), keep)[1]  # type: ignore[func-returns-value]


def _name_slow_layers(rows: list[dict[str, Any]], nets: Mapping[str, nn.Module], x: Tensor) -> None:
    """Time the layers of slow networks and of the dense one, in eager mode, and add the slow layers to the rows."""
    slow = [row for row in rows if row["slow"]]
    if slow:
        dense = time_layers(nets["dense"], x)
        for row in slow:
            layers = slow_layers(dense, time_layers(nets[row["network"]], x))
            row["slow_layers"] = [layer.record() for layer in layers]
            row["slow_because"] = describe(layers)


def show(name: str, rows: Sequence[Mapping[str, Any]], batch: int, mode: str, setting: Setting) -> None:
    """Print one table, and a note for every network that is slower than its MACs promise."""
    console = Console()
    last = ", channels_last" if setting.channels_last else ""
    title = f"{name} {setting.size}x{setting.size}, batch {batch}, {mode}, {setting.dtype}{last}, {setting.device}"
    console.print(title, highlight=False)
    table = Table("network", "MACs", "MACs ratio", "median", "speed-up", "", box=None, pad_edge=False)
    for row in rows:
        ratio, gain = f"{row['macs_ratio']:.2f}x", f"{row['speed_up']:.2f}x"
        mark = "< 0.8 of the MACs ratio" if row["slow"] else ""
        table.add_row(row["network"], show_count(row["macs"]), ratio, f"{row['ms']:.2f} ms", gain, mark)
    console.print(table, highlight=False)
    for row in rows:
        if row["slow"]:
            console.print(f"note: {row['network']}: most time beyond its work: {row['slow_because']}", highlight=False)
