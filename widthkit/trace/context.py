"""What a coupling rule sees of one operator call, and what it may say about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from widthkit.trace.labels import Alternative, Dims, Labels, LabelStore


@dataclass(frozen=True)
class CostRecord:
    """MACs of one call: ``scale`` times the kept positions of every label array."""

    module: str
    operator: str
    scale: int
    factors: tuple[Labels, ...]


@dataclass(frozen=True)
class AttributeRecord:
    """An integer attribute of a module that equals the number of kept positions among ``labels``."""

    module: str
    name: str
    element: int | None
    labels: Labels


@dataclass(frozen=True)
class Call:
    """One operator call: where it ran and the labels (or the fixed size) of every dim of its outputs."""

    path: str
    name: str
    outputs: tuple[tuple[Labels | int, ...], ...]


@dataclass
class RunState:
    """Everything one traced run records."""

    store: LabelStore = field(default_factory=LabelStore)
    dims: dict[int, Dims] = field(default_factory=dict)
    costs: list[CostRecord] = field(default_factory=list)
    attributes: list[AttributeRecord] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)
    seen: dict[str, list[Labels]] = field(default_factory=dict)
    """Module path -> label arrays that passed through its operators, where integer attributes may count them."""
    trail: list[Call] = field(default_factory=list)
    """Every call, in order."""
    calls: list[tuple[Any, Any, Any, Any]] = field(default_factory=list)
    """Operator, arguments, keyword arguments and result of every call, in order."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """Arguments of the running function that count channels, in the first run: ``groups``, ``normalized_shape``..."""
    keep: list[Any] = field(default_factory=list)
    """Every tensor of the run stays alive here, or a reused ``id`` would tie strangers."""

    def dims_of(self, tensor: Tensor) -> Dims:
        """Labels of every dim; tensors that nobody labelled are fixed."""
        return self.dims.get(id(tensor), (None,) * tensor.ndim)

    def set_dims(self, tensor: Tensor, dims: Dims) -> None:
        """Label a tensor; dims of size 1 carry no labels, since nothing of them can be dropped."""
        assert len(dims) == tensor.ndim, (dims, tensor.shape)
        clean = tuple(None if size == 1 else labels for labels, size in zip(dims, tensor.shape, strict=True))
        for labels, size in zip(clean, tensor.shape, strict=True):
            assert labels is None or len(labels) == size, (len(labels), size)
        self.dims[id(tensor)] = clean
        self.keep.append(tensor)

    def note(self, path: str, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Remember a finished call."""
        seen = self.seen.setdefault(path, [])
        for tensor in (*inputs, *outputs):
            seen.extend(labels for labels in self.dims_of(tensor) if labels is not None)
        shapes = tuple(
            tuple(n if labels is None else labels for labels, n in zip(self.dims_of(t), t.shape, strict=True))
            for t in outputs
        )
        self.trail.append(Call(path, name, shapes))


class OpContext:
    """One operator call. Rules read arguments by name and record ties, freezes, costs and attributes.

    Args:
        run: The record of the whole run.
        func: The ATen operator.
        args: Positional arguments.
        kwargs: Keyword arguments.
        out: What the call returned.
        path: Path of the module that runs the call, ``""`` for the model itself.
        module: That module.
    """

    def __init__(
        self, run: RunState, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, path: str, module: Any
    ) -> None:
        self.run = run
        self.func = func
        self.out = out
        self.path = path
        self.module: nn.Module = module
        self.name: str = func.overloadpacket.__name__
        self._bound = bind(func, args, kwargs)

    def arg(self, name: str, default: Any = None) -> Any:
        """Return the argument called ``name`` in the operator's schema."""
        return self._bound.get(name, default)

    @property
    def where(self) -> str:
        """Module and operator, for reasons and messages."""
        return f"{self.path or 'model'}: '{self.name}'"

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, lists included."""
        return flat_tensors(tuple(self._bound.values()))

    def outputs(self) -> list[Tensor]:
        """All tensors that the call returned."""
        return flat_tensors((self.out,))

    def dims(self, tensor: Tensor) -> Dims:
        """Labels of every dim of a tensor."""
        return self.run.dims_of(tensor)

    def set(self, tensor: Tensor, dims: Dims) -> None:
        """Label an output."""
        self.run.set_dims(tensor, dims)

    def new(self, size: int) -> Labels:
        """Return fresh labels."""
        return self.run.store.new(size)

    def freeze(self, labels: Labels | None, reason: str) -> None:
        """Freeze a dim, if it carries labels at all; the reason is prefixed by module and operator."""
        if labels is not None:
            self.run.store.freeze(labels, f"{self.where} {reason}")

    def freeze_tensor(self, tensor: Tensor, reason: str) -> None:
        """Freeze every dim of a tensor."""
        for labels in self.dims(tensor):
            self.freeze(labels, reason)

    def choose(self, what: str, alternatives: Iterable[Alternative]) -> None:
        """Record a shape demand that can be met in several ways; ``what`` completes "module: 'operator' ..."."""
        self.run.store.choose(self.path, f"{self.where} {what}".strip(), alternatives)

    def match(self, *sides: tuple[Labels | None, int]) -> Labels | None:
        """Tie dims that must keep equal sizes, each given as ``(labels, size)``; return labels of the result.

        Size-1 dims broadcast and are left out. A labelled dim that meets one of fixed size is frozen.
        """
        wide = [(labels, size) for labels, size in sides if size != 1]
        labelled = [labels for labels, _ in wide if labels is not None]
        if not labelled:
            return None
        first = labelled[0]
        for other in labelled[1:]:
            if len(other) == len(first):
                self.run.store.tie(first, other, f"{self.where} meets constant padding")
            else:
                self.freeze(first, "meets a dim of another size")
                self.freeze(other, "meets a dim of another size")
        if len(labelled) < len(wide):
            for labels in labelled:
                self.freeze(labels, f"meets a dim of fixed size {wide[0][1]}")
        return first

    def macs(self, factors: Sequence[tuple[Labels | None, int]], scale: int = 1) -> None:
        """Record ``scale`` times the product of the factors, each ``(labels, size)``, as MACs of this call."""
        labelled = []
        for labels, size in factors:
            if labels is None:
                scale *= size
            else:
                labelled.append(labels)
        self.run.costs.append(CostRecord(self.path, self.name, scale, tuple(labelled)))

    def attribute(self, name: str, labels: Labels | None, element: int | None = None) -> None:
        """Let an integer attribute of the running module follow the number of kept positions, where it exists."""
        value = getattr(self.module, name, None)
        if element is not None and isinstance(value, (tuple, list)) and len(value) > element:
            value = value[element]
        if labels is not None and isinstance(value, int) and not isinstance(value, bool) and value == len(labels):
            self.run.attributes.append(AttributeRecord(self.path, name, element, labels))
        given = self.run.numbers.get(name)
        number = given[element] if isinstance(given, (tuple, list)) and element is not None else given
        source: Any = getattr(number, "source", None)
        if labels is not None and number == len(labels) and hasattr(source, "element"):
            self.run.attributes.append(AttributeRecord(source.path, source.name, source.element, labels))


def bind(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an operator call by schema name, defaults filled in."""
    bound: dict[str, Any] = {}
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args) and not argument.kwarg_only:
            bound[argument.name] = args[i]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def flat_tensors(value: Any) -> list[Tensor]:
    """List the tensors in a nested structure of tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in flat_tensors(item)]
    if isinstance(value, dict):
        return [t for item in value.values() for t in flat_tensors(item)]
    if hasattr(value, "__dataclass_fields__"):
        return [t for name in value.__dataclass_fields__ for t in flat_tensors(getattr(value, name))]
    return []
