"""Assemble the channel graph from the recording of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from widthkit.graph import AttributeInfo, ChannelGraph, IntArray, Positions, TensorInfo
from widthkit.graph.cost import CostModel, Polynomial, Term
from widthkit.modules.clone import all_names, named_tensors
from widthkit.trace.components import Components
from widthkit.trace.labels import Labels
from widthkit.trace.recording import AttributeRecord, Recording
from widthkit.trace.tensor_labels import TensorLabels
from widthkit.trace.units import Units


def build_graph(
    model: nn.Module,
    recording: Recording,
    tensor_labels: TensorLabels,
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
        recording: What its run recorded.
        tensor_labels: The labels of its tensors.
        solved: Which labels belong to one component.
        units: Which group every component belongs to.
        batch: Batch size of the example input; MACs are per example.
        attributes: Integer attributes that count channels; the first record of an attribute counts.
        notes: Remarks for the user.
    """
    parameters = {name for name, _ in model.named_parameters()}
    aliases = all_names(model)
    transposed = {id(m.weight) for m in model.modules() if isinstance(m, _ConvTransposeNd)}
    infos = {
        name: replace(
            _tensor_info(name, tensor, tensor_labels, units, solved.unit),
            is_parameter=name in parameters,
            aliases=tuple(aliases[name][1:]),
            transposed=id(tensor) in transposed,
        )
        for name, tensor in named_tensors(model).items()
    }
    frozen = _frozen_report(infos, tensor_labels, solved, units)
    cost = _cost(recording, infos, units, solved.unit, batch)
    counting = _attributes(attributes, units, solved.unit)
    return ChannelGraph(units.names, units.widths, infos, counting, frozen, cost, tuple(notes))


def affine_forms(solved: Components, units: Units) -> Callable[[Labels], IntArray]:
    """Return a function that maps labels to how many of them remain: ``[1 + groups]``, affine in the widths.

    Args:
        solved: Which labels belong to one component.
        units: Which group every component belongs to.
    """
    return lambda labels: units.positions(solved.unit[labels]).affine(len(units.names), units.widths)


def _tensor_info(name: str, tensor: Tensor, tensor_labels: TensorLabels, units: Units, unit: Labels) -> TensorInfo:
    dims: list[Positions | None] = []
    for labels in tensor_labels.get(name, (None,) * tensor.ndim):
        positions = None if labels is None else units.positions(unit[labels])
        dims.append(positions if positions is not None and positions.searchable else None)
    return TensorInfo(name, tuple(tensor.shape), tuple(dims), is_parameter=False)


def _attributes(records: Sequence[AttributeRecord], units: Units, unit: Labels) -> tuple[AttributeInfo, ...]:
    found: dict[tuple[str, str, int | None], AttributeInfo] = {}
    for record in records:
        positions = units.positions(unit[record.labels])
        key = (record.module, record.name, record.element)
        if positions.searchable and key not in found:
            found[key] = AttributeInfo(*key, positions)
    return tuple(found.values())


def _frozen_report(
    infos: Mapping[str, TensorInfo], tensor_labels: TensorLabels, solved: Components, units: Units
) -> dict[str, str]:
    """Say why a dim, or a part of it, is not searchable; dims that are wholly searchable are left out."""
    report: dict[str, str] = {}
    for name, info in infos.items():
        own = tensor_labels.get(name, (None,) * len(info.shape))
        for dim, labels in enumerate(own):
            key = f"{name}[{dim}]"
            if labels is None:
                report[key] = _unlabelled(info.shape[dim], name in tensor_labels)
                continue
            components = solved.unit[labels]
            fixed = components[units.group[components] < 0]
            if len(fixed):
                first = int(fixed[0])
                why = solved.reason(first) or units.single.get(first, "no parameter depends on it")
                partly = "" if len(fixed) == len(components) else f"{len(fixed)} of {len(components)} positions: "
                report[key] = partly + why
    return report


def _unlabelled(size: int, is_floating: bool) -> str:
    if size == 1:
        return "size 1"
    return "size of a convolution kernel" if is_floating else "not a floating-point tensor"


def _cost(recording: Recording, infos: Mapping[str, TensorInfo], units: Units, unit: Labels, batch: int) -> CostModel:
    n = len(units.names)

    def form(positions: Positions) -> IntArray:
        return positions.affine(n, units.widths)

    macs = [
        Term(c.module, c.operator, c.scale, tuple(form(units.positions(unit[f])) for f in c.factors))
        for c in recording.costs
    ]
    params = []
    for info in infos.values():
        if info.is_parameter:
            scale = int(np.prod([s for s, d in zip(info.shape, info.dims, strict=True) if d is None], dtype=np.int64))
            forms = tuple(form(d) for d in info.dims if d is not None)
            params.append(Term(info.name.rpartition(".")[0], info.name, scale, forms))
    return CostModel(Polynomial.of(macs, n, batch), Polynomial.of(params, n))
