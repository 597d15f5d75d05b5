"""What one run of a labelled model records: labels, ties, costs, attributes, sizes and every operator call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from widthkit.trace.labels import Dims, Labels, LabelStore
from widthkit.trace.sizes import Comparison, Source, Untraced


@dataclass(frozen=True)
class CostRecord:
    """MACs of one call: ``scale`` times the number of kept positions of every label array."""

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

    @property
    def key(self) -> tuple[str, str, int | None]:
        """Module, attribute and element: what one value is stored under."""
        return self.module, self.name, self.element


@dataclass(frozen=True)
class TracedCall:
    """One operator call.

    Args:
        path: Path of the module that ran it.
        func: The ATen operator.
        args: Positional arguments.
        kwargs: Keyword arguments.
        out: What it returned.
        sizes: For every returned tensor, per dim its labels or its fixed size.
    """

    path: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    sizes: tuple[tuple[Labels | int, ...], ...]


@dataclass(frozen=True, eq=False)
class SizeUse:
    """An integer that must equal the number of kept positions of a dim, or of the part before or behind a bound.

    Args:
        source: Where the integer comes from; a plain integer never changes.
        labels: The labels of the dim or part; ``None`` where its size is fixed.
        where: Path of the module that used it.
    """

    source: Source | int
    labels: Labels | None
    where: str


@dataclass
class Recording:
    """Everything one traced run records.

    Args:
        store: Labels, ties, freezes and choices.
        dims: ``id`` of a tensor -> the labels of its dims.
        costs: MACs of every call.
        attributes: Integer attributes that count channels.
        used: ``id`` of every tensor that an operator read.
        seen: Module path -> the label arrays that its operators read or wrote, in order.
        calls: Every operator call, in order.
        cuts: Labels of the parts that operators cut off a dim.
        size_uses: Where integers from Python became sizes; filled in the first run only.
        comparisons: Comparisons of sizes in the model's own code; filled in the first run only.
        untraced: Sizes that went into a float or through ``int`` there.
        counting_arguments: Arguments of the function that runs now which count channels (``groups``,
            ``normalized_shape``...); filled in the first run only.
        kept_alive: Every tensor of the run. Python gives the ``id`` of a deleted tensor to a new one, which would
            then carry its labels.
    """

    store: LabelStore = field(default_factory=LabelStore)
    dims: dict[int, Dims] = field(default_factory=dict)
    costs: list[CostRecord] = field(default_factory=list)
    attributes: list[AttributeRecord] = field(default_factory=list)
    used: set[int] = field(default_factory=set)
    seen: dict[str, list[Labels]] = field(default_factory=dict)
    calls: list[TracedCall] = field(default_factory=list)
    cuts: list[Labels] = field(default_factory=list)
    size_uses: list[SizeUse] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    untraced: list[Untraced] = field(default_factory=list)
    counting_arguments: dict[str, Any] = field(default_factory=dict)
    kept_alive: list[Any] = field(default_factory=list)

    def dims_of(self, tensor: Tensor) -> Dims:
        """Return the labels of every dim; ``None`` where a dim has none."""
        return self.dims.get(id(tensor), (None,) * tensor.ndim)

    def set_dims(self, tensor: Tensor, dims: Dims) -> None:
        """Label a tensor; labels of dims of size 1 are dropped, since these cannot shrink."""
        assert len(dims) == tensor.ndim, (dims, tensor.shape)
        clean = tuple(None if size == 1 else labels for labels, size in zip(dims, tensor.shape, strict=True))
        for labels, size in zip(clean, tensor.shape, strict=True):
            assert labels is None or len(labels) == size, (len(labels), size)
        self.dims[id(tensor)] = clean
        self.kept_alive.append(tensor)

    def add_call(
        self, path: str, call: tuple[Any, Any, Any, Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        """Record a finished call.

        Args:
            path: Path of the module that ran it.
            call: Operator, arguments, keyword arguments and result.
            inputs: The tensors among the arguments.
            outputs: The tensors among the results, labelled already.
        """
        seen = self.seen.setdefault(path, [])
        for tensor in (*inputs, *outputs):
            seen.extend(labels for labels in self.dims_of(tensor) if labels is not None)
        sizes = tuple(
            tuple(n if labels is None else labels for labels, n in zip(self.dims_of(t), t.shape, strict=True))
            for t in outputs
        )
        self.calls.append(TracedCall(path, *call, sizes))
