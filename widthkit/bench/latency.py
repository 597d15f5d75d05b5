"""Dense, slim, uniformly slim, and torch-pruning's uniform network: speed-up beside the MACs ratio."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from widthkit.bench.files import write
from widthkit.budget import parse_budget, show_count
from widthkit.errors import OptionError, close_matches
from widthkit.export import export, load, origin_of
from widthkit.export.writer import DTYPES
from widthkit.graph.space import uniform_space
from widthkit.latency.slow_layers import describe, is_slow, slow_layers, time_layers
from widthkit.latency.timing import interleaved, keep_pages
from widthkit.modules.models import ModelName, create_model, input_channels
from widthkit.search.uniform import uniform_widths
from widthkit.trace import trace
from widthkit.train.modes import checked_device

MODES = ("eager", "compiled", "graphs")
_STEPS = 8


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
    models: list[str],
    budget: str,
    batches: list[int],
    modes: list[str],
    setting: Setting,
    divisor: int,
    out: Path | None,
    *,
    slim: Path | None = None,
    widths: dict[str, int] | None = None,
    peer: bool = True,
) -> None:
    """Measure and print; networks of one model take turns in one process.

    Args:
        models: Dense models by name.
        budget: What the uniform networks may cost.
        batches: Batch sizes.
        modes: Of ``eager``, ``compiled``, ``graphs`` (CUDA graphs).
        setting: How networks are run.
        divisor: Widths of the uniform networks are multiples of this.
        out: Result file.
        slim: A saved slim network to measure beside them; the others then have its factory's arguments too.
        widths: Searched widths to measure beside them.
        peer: Measure torch-pruning's network too.

    Raises:
        OptionError: If a mode or dtype is unknown or not possible here, or ``slim`` or ``widths`` is of another model.
    """
    check(modes, setting)
    if len(models) > 1 and (slim is not None or widths is not None):
        raise OptionError(f"--slim and --widths are of one model; pass one --model, not {', '.join(models)}")
    kept = keep_pages()
    rows = []
    for name in models:
        nets, macs = networks(name, budget, divisor, setting.size, slim, widths, peer)
        for batch in batches:
            for mode in modes:
                found = measure(nets, macs, batch, mode, setting)
                rows += [{"model": name, **row} for row in found]
                show(name, found, batch, mode, setting)
    used = {"budget": budget, "divisor": divisor, "dtype": setting.dtype, "channels_last": setting.channels_last}
    write(out, "latency", rows, setting.device, **used, size=setting.size, repeats=setting.repeats, pages_kept=kept)


def check(modes: list[str], setting: Setting) -> None:
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


def networks(
    name: str,
    budget: str,
    divisor: int,
    size: int,
    slim: Path | None = None,
    widths: dict[str, int] | None = None,
    peer: bool = True,
) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """Build the networks to compare; return them and their MACs per image.

    Raises:
        OptionError: If the saved network was made from another model.
    """
    saved, kwargs = _saved(slim, name)
    dense = create_model(name, **kwargs).eval()
    shape = (1, input_channels(dense), size, size)
    graph = trace(dense, shape)
    most = parse_budget(budget, graph)
    # Many choices, for with one the narrowest width would round up to the only multiple that is left.
    space = uniform_space(graph, 256, min_width="0.05x", divisor=divisor)
    nets = {"dense": dense, "uniform": export(dense, uniform_widths(space, most), graph=graph)}
    if widths is not None:
        nets["searched"] = export(dense, widths, graph=graph)
    if saved is not None:
        nets["slim"] = saved.eval()
    macs = {key: trace(net, shape).macs() for key, net in nets.items()}
    if peer:
        nets["torch-pruning"], macs["torch-pruning"] = _peer(ModelName(name, kwargs), macs["uniform"], shape, divisor)
    return nets, macs


def _saved(slim: Path | None, name: str) -> tuple[nn.Module | None, Mapping[str, Any]]:
    """Load the saved network; return it with its factory's arguments, such as the number of classes."""
    if slim is None:
        return None, {}
    net = load(slim, allow=[name])
    origin = origin_of(net)
    if origin is None or origin.model is None or origin.model.name != name:
        made = origin.model.name if origin and origin.model else "another model"
        raise OptionError(f"{slim} was made from {made}, not from {name}; pass --model {made}")
    return net, origin.model.kwargs


def _peer(name: ModelName, most: int, shape: tuple[int, ...], divisor: int) -> tuple[nn.Module, int]:
    """Prune with torch-pruning at one ratio everywhere, the smallest that costs at most what our uniform net does."""
    import torch_pruning

    def pruned(ratio: float) -> tuple[nn.Module, int]:
        torch.manual_seed(0)
        net = name.build().eval()
        last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1:]
        torch_pruning.pruner.BasePruner(
            net,
            torch.zeros(shape),
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=last,
            round_to=divisor if divisor > 1 else None,
        ).step()
        macs, _ = torch_pruning.utils.count_ops_and_params(net, torch.zeros(shape))
        return net, int(macs)

    low, high = 0.0, 0.95
    best = pruned(high)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        candidate = pruned(middle)
        if candidate[1] <= most:
            best, high = candidate, middle
        else:
            low = middle
    # torch-pruning counts norms and biases too; ours counts what all the others are counted by.
    return best[0], trace(best[0], shape).macs()


def measure(
    nets: dict[str, nn.Module], macs: dict[str, int], batch: int, mode: str, setting: Setting
) -> list[dict[str, Any]]:
    """Time the networks in turns; return one row per network, the dense one first."""
    channels = input_channels(nets["dense"])
    dtype = DTYPES[setting.dtype]
    x = torch.randn(batch, channels, setting.size, setting.size, generator=torch.Generator().manual_seed(0))
    x = x.to(setting.device, dtype)
    format_ = torch.channels_last if setting.channels_last else torch.contiguous_format
    x = x.contiguous(memory_format=format_)
    ready = {n: net.to(setting.device, dtype).to(memory_format=format_).eval() for n, net in nets.items()}  # type: ignore[call-overload]
    # Networks of one class share a cache of compiled code; where it is full (eight entries, unless a library such as
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
    _blame(rows, ready, x)
    return rows


def _call(net: nn.Module, x: Tensor, mode: str) -> Callable[[], object]:
    if mode == "compiled":
        # Without this the second network of a class gets kernels of dynamic shapes.
        compiled = torch.compile(net, dynamic=False)
        return lambda: compiled(x)
    if mode == "graphs":
        return _graph(net, x)
    return lambda: net(x)


def _graph(net: nn.Module, x: Tensor) -> Callable[[], object]:
    """Capture a forward pass as a CUDA graph; a call replays it on the same memory."""
    with torch.cuda.device(x.device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose kernels and take their workspaces before the capture
                net(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = net(x)
    # The result's memory belongs to the graph and must outlive it.
    keep = (x, result)
    return lambda: (graph.replay(), keep)[1]  # type: ignore[func-returns-value]


def _blame(rows: list[dict[str, Any]], nets: dict[str, nn.Module], x: Tensor) -> None:
    """Time the layers of marked networks and of the dense one, in eager mode."""
    slow = [row for row in rows if row["slow"]]
    if slow:
        dense = time_layers(nets["dense"], x)
        for row in slow:
            layers = slow_layers(dense, time_layers(nets[row["network"]], x))
            row["slow_layers"] = [layer.record() for layer in layers]
            row["slow_because"] = describe(layers)


def show(name: str, rows: list[dict[str, Any]], batch: int, mode: str, setting: Setting) -> None:
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
