"""From the record of a run to a channel graph."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from widthkit.graph import AttributeInfo, ChannelGraph, IntArray, Positions, TensorInfo
from widthkit.graph.cost import CostModel, Polynomial, Term
from widthkit.modules.clone import all_names, named_tensors
from widthkit.trace.components import Components
from widthkit.trace.context import AttributeRecord, RunState
from widthkit.trace.labels import Labels

_READ_ALONG_0 = (nn.Embedding, nn.EmbeddingBag, _ConvTransposeNd)


@dataclass
class Seeds:
    """The labels that the model's own tensors started with: tensor name -> per dim labels or ``None``."""

    labels: dict[str, tuple[Labels | None, ...]]


def seed_labels(model: nn.Module, run: RunState) -> Seeds:
    """Label every dim of every floating-point parameter and buffer of a copy of the model, kernels excepted."""
    seeds: dict[str, tuple[Labels | None, ...]] = {}
    kernels = {id(m.weight) for m in model.modules() if isinstance(m, _ConvNd)}
    for name, tensor in named_tensors(model).items():
        if tensor.is_floating_point():
            n_labelled = 2 if id(tensor) in kernels else tensor.ndim
            sizes = enumerate(tensor.shape)
            run.set_dims(tensor, tuple(run.store.new(n) if n > 1 and d < n_labelled else None for d, n in sizes))
            seeds[name] = run.dims_of(tensor)
    return Seeds(seeds)


def freeze_unused(model: nn.Module, run: RunState, seeds: Seeds) -> list[str]:
    """Freeze parameters that the run never touched; return their names."""
    unused = []
    for name, tensor in named_tensors(model).items():
        if name in seeds.labels and id(tensor) not in run.used:
            for labels in seeds.labels[name]:
                if labels is not None:
                    run.store.freeze(labels, "not used in the traced run")
            unused.append(name)
    return unused


def freeze_matching(model: nn.Module, run: RunState, seeds: Seeds, patterns: Iterable[str], reason: str) -> list[str]:
    """Freeze the widths that modules produce; return the patterns that match nothing."""
    missed = []
    for pattern in patterns:
        hit = False
        for name in seeds.labels:
            if under(name.rpartition(".")[0], pattern):
                hit = True
                freeze_produced(model, run, seeds, name, reason)
        if not hit:
            missed.append(pattern)
    return missed


def freeze_produced(model: nn.Module, run: RunState, seeds: Seeds, name: str, reason: str) -> None:
    """Freeze the width that a tensor's module produces."""
    labels = seeds.labels[name]
    made = labels[produced_dim(model, name)] if labels else None
    if made is not None:
        run.store.freeze(made, reason)


def produced_dim(model: nn.Module, name: str) -> int:
    """Return the dim of a tensor that counts what its module produces: 0, but 1 for matrices that read along dim 0.

    >>> produced_dim(nn.Sequential(nn.Linear(3, 4), nn.Embedding(5, 6)), "1.weight")
    1
    """
    path, _, last = name.rpartition(".")
    return int(last == "weight" and isinstance(model.get_submodule(path), _READ_ALONG_0))


def under(module: str, pattern: str) -> bool:
    """Whether a module path matches a pattern or lies below a module that does.

    >>> under("layer4.0.conv1", "layer4"), under("layer40", "layer4"), under("layer4.1", "layer*.1")
    (True, False, True)
    """
    return fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(module, f"{pattern}.*")


@dataclass(frozen=True)
class Units:
    """``group[c]`` and ``rank[c]`` of every component; -1 where it is fixed; ``lone`` names units that are alone."""

    names: tuple[str, ...]
    widths: IntArray
    group: IntArray
    rank: IntArray
    lone: Mapping[int, str]

    def positions(self, components: IntArray) -> Positions:
        """Return which group and which rank in it every one of some components has."""
        group = self.group[components]
        return Positions(group, np.where(group >= 0, self.rank[components], 0))


def build_graph(
    model: nn.Module,
    run: RunState,
    seeds: Seeds,
    solved: Components,
    units: Units,
    *,
    batch: int,
    attributes: Sequence[AttributeRecord],
    notes: Sequence[str] = (),
) -> ChannelGraph:
    """Assemble the graph.

    Args:
        model: The copy that was run.
        run: Its record.
        seeds: The labels its tensors started with.
        solved: Which labels belong to one component.
        units: Which group every component belongs to.
        batch: Batch size of the example input; MACs are per example.
        attributes: Integer attributes that count channels; of several for one attribute the first holds.
        notes: What the tracer wants people to know.
    """
    tensors = named_tensors(model)
    parameters = {name for name, _ in model.named_parameters()}
    unit = solved.unit
    aliases = all_names(model)
    turned = {id(m.weight) for m in model.modules() if isinstance(m, _ConvTransposeNd)}
    infos = {
        name: replace(
            _tensor_info(name, tensor, seeds, units, unit, name in parameters, tuple(aliases[name][1:])),
            transposed=id(tensor) in turned,
        )
        for name, tensor in tensors.items()
    }
    frozen = _frozen_report(infos, seeds, solved, units)
    cost = _cost(run, infos, units, unit, batch)
    found = _attributes(attributes, units, unit)
    return ChannelGraph(units.names, units.widths, infos, found, frozen, cost, tuple(notes))


def affine_forms(solved: Components, units: Units) -> Callable[[Labels], IntArray]:
    """Return a function that says how many positions of a label array remain: ``[1 + groups]``, affine in the widths.

    Args:
        solved: Which labels belong to one component.
        units: Which group every component belongs to.
    """
    return lambda labels: units.positions(solved.unit[labels]).affine(len(units.names), units.widths)


def group_units(model: nn.Module, seeds: Seeds, solved: Components) -> Units:
    """Group components that occur equally often at the same tensor dims.

    Args:
        model: The copy that was run.
        seeds: The labels its tensors started with.
        solved: Which labels belong to one component, and which components are frozen.
    """
    unit = solved.unit
    lone: dict[int, str] = {}
    parameters = {name for name, _ in model.named_parameters()}
    columns: list[IntArray] = []
    where: list[tuple[str, int]] = []
    for name, dims in seeds.labels.items():
        for dim, labels in enumerate(dims):
            if labels is not None:
                columns.append(unit[labels])
                where.append((name, dim))
    n = int(unit.max()) + 1
    group = np.full(n, -1, dtype=np.int64)
    rank = np.zeros(n, dtype=np.int64)
    if not columns:
        return Units((), np.zeros(0, dtype=np.int64), group, rank, lone)
    members = _signatures(columns, n, solved.frozen, {i for i, (name, _) in enumerate(where) if name in parameters})
    producers = {i for i, (name, dim) in enumerate(where) if name in parameters and _makes(seeds.labels[name], dim)}
    names: list[str] = []
    widths: list[int] = []
    for own_sites, components in members:
        first = next((i for i in own_sites if i in producers), own_sites[0])
        name = _unique_name(where[first][0].rpartition(".")[0] or where[first][0], names)
        if len(components) == 1:
            lone[int(components[0])] = f"{name}: everything here is coupled into a single unit"
            continue
        group[components] = len(names)
        rank[components] = np.arange(len(components))
        names.append(name)
        widths.append(len(components))
    return Units(tuple(names), np.array(widths, dtype=np.int64), group, rank, lone)


def _makes(labels: tuple[Labels | None, ...], dim: int) -> bool:
    """Whether a dim is what a weight matrix or kernel makes, rather than a vector that follows channels."""
    return dim == 0 and any(other is not None for other in labels[1:])


def _signatures(
    columns: list[IntArray], n: int, frozen: npt.NDArray[np.bool_], in_parameters: set[int]
) -> list[tuple[list[int], IntArray]]:
    """Return ``(sites, components in the order of their first position)`` of every group, in site order."""
    sites = np.concatenate([np.full(len(c), i, dtype=np.int64) for i, c in enumerate(columns)])
    components = np.concatenate(columns)
    first_seen = np.full(n, np.iinfo(np.int64).max, dtype=np.int64)
    # Where an index repeats, the last value holds; backwards that is the first.
    first_seen[components[::-1]] = np.arange(len(components))[::-1]
    pairs, counts = np.unique(components * len(columns) + sites, return_counts=True)
    owner, site = pairs // len(columns), pairs % len(columns)
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    groups: dict[bytes, tuple[list[int], list[int]]] = {}
    for start, stop in zip(starts, [*starts[1:], len(owner)], strict=True):
        component = int(owner[start])
        own_sites = site[start:stop]
        if frozen[component] or not in_parameters.intersection(own_sites.tolist()):
            continue
        key = own_sites.tobytes() + b"|" + counts[start:stop].tobytes()
        groups.setdefault(key, (own_sites.tolist(), []))[1].append(component)
    ordered = [(own, np.array(sorted(m, key=lambda c: first_seen[c]))) for own, m in groups.values()]
    return sorted(ordered, key=lambda item: int(first_seen[item[1][0]]))


def _unique_name(name: str, taken: list[str]) -> str:
    """Number the groups that start at the same module: ``conv``, ``conv:2``...

    >>> _unique_name("conv", ["conv"])
    'conv:2'
    """
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}:{count}"
    return candidate


def _tensor_info(
    name: str, tensor: Tensor, seeds: Seeds, units: Units, unit: Labels, is_parameter: bool, aliases: tuple[str, ...]
) -> TensorInfo:
    dims: list[Positions | None] = []
    for labels in seeds.labels.get(name, (None,) * tensor.ndim):
        positions = None if labels is None else units.positions(unit[labels])
        dims.append(positions if positions is not None and positions.searchable else None)
    return TensorInfo(name, tuple(tensor.shape), tuple(dims), is_parameter, aliases)


def _attributes(records: Sequence[AttributeRecord], units: Units, unit: Labels) -> tuple[AttributeInfo, ...]:
    found: dict[tuple[str, str, int | None], AttributeInfo] = {}
    for record in records:
        positions = units.positions(unit[record.labels])
        key = (record.module, record.name, record.element)
        if positions.searchable and key not in found:
            found[key] = AttributeInfo(*key, positions)
    return tuple(found.values())


def _frozen_report(infos: Mapping[str, TensorInfo], seeds: Seeds, solved: Components, units: Units) -> dict[str, str]:
    """Say for every dim that is not, or not wholly, searchable why it is not."""
    report: dict[str, str] = {}
    for name, info in infos.items():
        own = seeds.labels.get(name, (None,) * len(info.shape))
        for dim, labels in enumerate(own):
            key = f"{name}[{dim}]"
            if labels is None:
                report[key] = _unlabelled(name, info.shape[dim], seeds)
                continue
            components = solved.unit[labels]
            stuck = components[units.group[components] < 0]
            if len(stuck):
                first = int(stuck[0])
                why = solved.reason(first) or units.lone.get(first, "no parameter depends on it")
                partly = "" if len(stuck) == len(components) else f"{len(stuck)} of {len(components)} positions: "
                report[key] = partly + why
    return report


def _unlabelled(name: str, size: int, seeds: Seeds) -> str:
    if size == 1:
        return "size 1"
    return "size of a convolution kernel" if name in seeds.labels else "not a floating-point tensor"


def _cost(run: RunState, infos: Mapping[str, TensorInfo], units: Units, unit: Labels, batch: int) -> CostModel:
    n = len(units.names)

    def form(positions: Positions) -> IntArray:
        return positions.affine(n, units.widths)

    macs = [
        Term(c.module, c.operator, c.scale, tuple(form(units.positions(unit[f])) for f in c.factors)) for c in run.costs
    ]
    params = []
    for info in infos.values():
        if info.is_parameter:
            scale = int(np.prod([s for s, d in zip(info.shape, info.dims, strict=True) if d is None], dtype=np.int64))
            forms = tuple(form(d) for d in info.dims if d is not None)
            params.append(Term(info.name.rpartition(".")[0], info.name, scale, forms))
    return CostModel(Polynomial.of(macs, n, batch), Polynomial.of(params, n))
