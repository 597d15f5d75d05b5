"""What a coupling rule sees of one operator call, and what it may say about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from widthkit.trace.labels import Alternative, Dims, Labels
from widthkit.trace.recording import AttributeRecord, CostRecord, Recording
from widthkit.trace.sizes import AttributeSource, TracedInt


class OpContext:
    """One operator call. Rules read arguments by name and record ties, freezes, costs and attributes.

    Args:
        recording: The recording of the whole run.
        func: The ATen operator.
        args: Positional arguments.
        kwargs: Keyword arguments.
        out: What the call returned.
        path: Path of the module that runs the call, ``""`` for the model itself.
        module: That module.
    """

    def __init__(
        self,
        recording: Recording,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        path: str,
        module: Any,
    ) -> None:
        self.recording = recording
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
        return self.recording.dims_of(tensor)

    def set(self, tensor: Tensor, dims: Dims) -> None:
        """Label an output."""
        self.recording.set_dims(tensor, dims)

    def new(self, size: int) -> Labels:
        """Return fresh labels."""
        return self.recording.store.new(size)

    def freeze(self, labels: Labels | None, reason: str) -> None:
        """Freeze a dim, if it carries labels at all; the reason is prefixed by module and operator."""
        if labels is not None:
            self.recording.store.freeze(labels, f"{self.where} {reason}")

    def freeze_tensor(self, tensor: Tensor, reason: str) -> None:
        """Freeze every dim of a tensor."""
        for labels in self.dims(tensor):
            self.freeze(labels, reason)

    def cut(self, before: Labels | None, after: Labels | None) -> None:
        """Record that a part of a dim is cut off. Positions inside and outside of it are treated differently."""
        if before is not None and after is not None and 0 < len(after) < len(before):
            self.recording.cuts.append(after)

    def choose(self, what: str, alternatives: Iterable[Alternative]) -> None:
        """Record a shape demand that can be met in several ways; ``what`` completes "module: 'operator' ..."."""
        self.recording.store.choose(self.path, f"{self.where} {what}".strip(), alternatives)

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
                self.recording.store.tie(first, other, f"{self.where} meets constant padding")
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
        self.recording.costs.append(CostRecord(self.path, self.name, scale, tuple(labelled)))

    def attribute(self, name: str, labels: Labels | None, element: int | None = None) -> None:
        """Let an integer attribute follow the number of kept positions among ``labels``.

        Two attributes may follow: the running module's own attribute ``name`` where its value equals the number of
        positions, and the attribute that was passed as the argument ``name`` of the running function.

        Args:
            name: Name of the attribute or argument.
            labels: What is counted; ``None`` does nothing.
            element: Index into the attribute where it is a tuple or list.
        """
        if labels is None:
            return
        value = _element(getattr(self.module, name, None), element)
        if isinstance(value, int) and not isinstance(value, bool) and int(value) == len(labels):
            self.recording.attributes.append(AttributeRecord(self.path, name, element, labels))
        given = _element(self.recording.counting_arguments.get(name), element)
        if isinstance(given, TracedInt) and int(given) == len(labels) and isinstance(given.source, AttributeSource):
            source = given.source
            self.recording.attributes.append(AttributeRecord(source.path, source.name, source.element, labels))


def _element(value: Any, element: int | None) -> Any:
    """Return an element of a tuple or list, or the value itself where it has no such element."""
    if element is not None and isinstance(value, (tuple, list)) and len(value) > element:
        return value[element]
    return value


def bind(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an operator call by the names of its schema, with defaults filled in."""
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
    """List the tensors in a nested structure of tuples, lists, dicts and dataclasses."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in flat_tensors(item)]
    if isinstance(value, dict):
        return [t for item in value.values() for t in flat_tensors(item)]
    if dataclasses.is_dataclass(value):
        return [t for field in dataclasses.fields(value) for t in flat_tensors(getattr(value, field.name))]
    return []
