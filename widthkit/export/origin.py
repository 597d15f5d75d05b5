"""The origin of a slim network: what is needed to rebuild it from its dense model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from widthkit.graph.plan import Plan
from widthkit.modules.models import ModelName
from widthkit.modules.structure import Dense

_ATTRIBUTE = "_widthkit_origin"


@dataclass(frozen=True)
class Origin:
    """How a slim network was made.

    Args:
        plan: The plan that turns the dense model into a network of its shapes.
        dense: Description by which the dense model is recognised.
        macs: MACs per example of the slim network.
        params: Parameters of the slim network.
        dense_macs: MACs per example of the dense model.
        dense_params: Parameters of the dense model.
        model: Name and arguments of the dense model, if known.
    """

    plan: Plan
    dense: Dense
    macs: int
    params: int
    dense_macs: int
    dense_params: int
    model: ModelName | None = None


def origin_of(net: nn.Module) -> Origin | None:
    """Return the origin of an exported network; ``None`` if widthkit did not export it."""
    return net.__dict__.get(_ATTRIBUTE)


def set_origin(net: nn.Module, origin: Origin) -> None:
    """Store an origin on its network, as plain data that neither ``forward`` nor ``state_dict`` sees."""
    net.__dict__[_ATTRIBUTE] = origin


def compose_origins(first: Origin, second: Origin) -> Origin:
    """Return the origin of a network that was slimmed twice, relative to the first dense model."""
    return replace(first, plan=compose_plans(first.plan, second.plan), macs=second.macs, params=second.params)


def compose_plans(first: Plan, second: Plan) -> Plan:
    """Return one plan that equals ``first`` followed by ``second``."""
    tensors = {name: dict(dims) for name, dims in first.tensors.items()}
    for name, dims in second.tensors.items():
        own = tensors.setdefault(name, {})
        for dim, index in dims.items():
            earlier = own.get(dim)
            own[dim] = index if earlier is None else np.where(index < 0, -1, earlier[np.maximum(index, 0)])
    attributes = {key: dict(values) for key, values in first.attributes.items()}
    for key, values in second.attributes.items():
        attributes.setdefault(key, {}).update(values)
    return Plan({**first.widths, **second.widths}, second.kept, tensors, attributes, first.shapes)
