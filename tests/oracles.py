"""Independent truth about a channel graph: nothing here looks inside the tracer.

Every check runs the model in float64. A tolerance of 1e-10 covers sums in another order and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.oracles.checks import fvcore_macs, n_params, permuted
from widthkit.export.dense import export
from widthkit.graph import ChannelGraph, IntArray, Site
from widthkit.graph.plan import apply_plan, make_plan
from widthkit.graph.resize import grow
from widthkit.supernet import Supernet, make_supernet

TOLERANCE = 1e-10


def run(model: nn.Module, x: Any) -> list[Tensor]:
    """All tensors that a model returns, without changing it."""
    with torch.no_grad():
        return flat(model(**x) if isinstance(x, dict) else model(x))


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if value is None or isinstance(value, (int, float, str)):
        return []
    items = value.values() if isinstance(value, Mapping) else value
    return [t for item in items for t in flat(item)]


def assert_same(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    assert len(actual) == len(expected), what
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape, f"{what}: {tuple(a.shape)} instead of {tuple(e.shape)}"
        # Relative to the output's size, so that unnormalised deep nets are judged like others.
        error = float((a - e).abs().max()) / max(1.0, float(e.abs().max()))
        assert error <= TOLERANCE, f"{what}: off by {error:.2e}"


def random_units(graph: ChannelGraph, rng: np.random.Generator) -> dict[str, IntArray]:
    """Any number of any units of every group."""
    return {n: np.sort(rng.permutation(w)[: rng.integers(1, w + 1)]) for n, w in graph.full.items()}


def random_widths(graph: ChannelGraph, rng: np.random.Generator) -> dict[str, int]:
    return {n: int(rng.integers(1, w + 1)) for n, w in graph.full.items()}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def check_permutation(model: nn.Module, graph: ChannelGraph, x: Any, rng: np.random.Generator, *, each: bool) -> None:
    """Permute groups one by one, or all at once: the outputs must not change."""
    expected = run(model, x)
    names = list(graph.groups)
    for chosen in [[n] for n in names] if each else [names]:
        assert_same(run(permuted(model, graph, rng, chosen), x), expected, f"permuting {chosen}")


def reads(model: nn.Module, site: Site) -> bool:
    """Whether a site is where a weight reads channels."""
    path, _, key = site.tensor.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return key == "weight" and site.dim == 0
    free = list(module._parameters) != ["weight", "bias"] and model.get_parameter(site.tensor).ndim == 2
    return site.dim == 1 and (isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or free)


def check_cut(model: nn.Module, graph: ChannelGraph, x: Any, rng: np.random.Generator) -> None:
    """Zero what consumers read of dropped channels in the full model: equals the exported one."""
    units = random_units(graph, rng)
    cut = copy.deepcopy(model)
    for name, group in graph.groups.items():
        dropped = np.setdiff1d(np.arange(group.width), units[name])
        for site in group.sites:
            if site.tensor in dict(model.named_parameters()) and reads(model, site):
                where = torch.from_numpy(site.index[dropped].reshape(-1))
                cut.get_parameter(site.tensor).data.index_fill_(site.dim, where, 0)
    slim = export(model, units, graph=graph)
    assert_same(run(slim, x), run(cut, x), f"cutting to {units}")


def check_same_net(net: Supernet, x: Any, widths: Mapping[str, int]) -> None:
    """What the supernet computes at some widths is what the exported network computes, on every path."""
    for path in range(len(net.paths(widths))):
        expected = run(net.set_widths(widths, path), x)
        slim = export(net, widths, path=path)
        assert not isinstance(slim, Supernet)
        assert_same(run(slim, x), expected, f"widths {widths}, path {path}")


def bc_net(model: nn.Module, graph: ChannelGraph) -> Supernet:
    return make_supernet(model, "bc", graph=graph, k=5)


def check_growth(model: nn.Module, graph: ChannelGraph, x: Any, rng: np.random.Generator) -> None:
    """Grow, then restrict to the units that were there: the model as it was, bit by bit."""
    wider = {n: w + int(rng.integers(0, 4)) for n, w in graph.full.items()}
    plan, wide_graph = grow(graph, wider)
    wide = apply_plan(model, plan)
    assert wide_graph.full == wider
    assert wide_graph.params() == n_params(wide) == graph.params(wider)
    assert all(t.isfinite().all() for t in run(wide, x))
    check_permutation(wide, wide_graph, x, rng, each=False)
    back = apply_plan(wide, make_plan(wide_graph, graph.full))
    for name, tensor in tensors_of(model).items():
        assert torch.equal(tensors_of(back)[name], tensor), name
    assert_same(run(back, x), run(model, x), "growing and shrinking back")


def check_cost(model: nn.Module, graph: ChannelGraph, x: Tensor, units: Mapping[str, Any]) -> None:
    """MACs and parameters of the exported network, to the last digit."""
    slim = export(model, units, graph=graph)
    widths = {n: len(u) if hasattr(u, "__len__") else u for n, u in units.items()}
    assert graph.params(widths) == n_params(slim)
    assert graph.macs(widths) == fvcore_macs(slim, (x[:1],))
