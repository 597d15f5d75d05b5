"""The channel graph: which channels belong together, as pure data without a tensor of the model.

Every dim of every parameter and buffer is a row of *positions*. A position is either fixed or belongs to one *unit*
(channels that can only be kept or dropped together) of one *channel group* (units that are interchangeable, so that a
group has a *width*: how many of its units are kept).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from widthkit.errors import WidthsError, close_matches
from widthkit.graph.memory import MemoryModel

if TYPE_CHECKING:
    from widthkit.graph.cost import CostModel
    from widthkit.graph.program import Program

IntArray = npt.NDArray[np.int64]
Widths = Mapping[str, int]
Kept = Mapping[str, "int | Sequence[int] | IntArray"]


@dataclass(frozen=True)
class Positions:
    """The positions along one dim of a tensor, or behind one integer attribute.

    Args:
        group: ``[size]``; index of the group that owns each position, -1 where the position is fixed.
        rank: ``[size]``; the unit of that group, 0 where the position is fixed.
    """

    group: IntArray
    rank: IntArray

    def __len__(self) -> int:
        return len(self.group)

    @cached_property
    def searchable(self) -> bool:
        """Whether any position can be dropped."""
        return bool((self.group >= 0).any())

    def affine(self, n_groups: int, widths: IntArray) -> IntArray:
        """Return ``[1 + n_groups]``: the fixed positions, then the positions that one unit of each group owns."""
        counts = np.bincount(self.group + 1, minlength=n_groups + 1)
        per_unit = counts[1:] // np.maximum(widths, 1)
        return np.concatenate([counts[:1], per_unit]).astype(np.int64)


@dataclass(frozen=True)
class Site:
    """One place where a group's units live.

    Args:
        tensor: Name of the parameter or buffer.
        dim: The dim of that tensor.
        index: ``[width, positions per unit]``; row ``u`` lists the positions of unit ``u``.
    """

    tensor: str
    dim: int
    index: IntArray


@dataclass(frozen=True)
class ChannelGroup:
    """Units that are kept or dropped together wherever they occur, and can be exchanged for one another."""

    name: str
    width: int
    sites: tuple[Site, ...] = field(repr=False)


@dataclass(frozen=True)
class TensorInfo:
    """Shape and positions of one parameter or buffer; ``dims[d]`` is ``None`` where nothing can be dropped.

    ``transposed`` says that dim 0 of a weight is what it reads and dim 1 what it writes.
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[Positions | None, ...]
    is_parameter: bool
    aliases: tuple[str, ...] = ()
    transposed: bool = False


@dataclass(frozen=True)
class AttributeInfo:
    """An integer attribute of a module (``groups``, ``in_channels``...) that counts kept positions.

    Args:
        module: Path of the module in the model.
        name: Name of the attribute.
        element: Index into the attribute when it is a tuple or list, else ``None``.
        positions: What is counted.
    """

    module: str
    name: str
    element: int | None
    positions: Positions


@dataclass(frozen=True)
class ChannelGraph:
    """Who is coupled to whom, what is frozen and why, and what every choice of widths costs.

    Args:
        group_names: Name of every group, in the order of the traced run.
        group_widths: ``[groups]``; units of every group.
        tensors: Every floating-point parameter and buffer.
        attributes: The Python integers that follow the widths.
        frozen: ``"tensor[dim]" -> reason`` for every dim, or part of a dim, that is not searchable.
        cost: Exact MACs and parameters.
        notes: What the tracer wants people to know.
        program: Operators and memory of the traced run; ``None`` where two runs differ.
    """

    group_names: tuple[str, ...]
    group_widths: IntArray
    tensors: Mapping[str, TensorInfo]
    attributes: tuple[AttributeInfo, ...]
    frozen: Mapping[str, str]
    cost: CostModel
    notes: tuple[str, ...] = ()
    program: Program | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # A read-only mapping can neither be copied nor pickled; it is made again.
        return {name: value for name, value in self.__dict__.items() if name != "groups"}

    @cached_property
    def groups(self) -> Mapping[str, ChannelGroup]:
        """Mapping group name -> :class:`ChannelGroup`, in the order of the traced run."""
        sites: list[list[Site]] = [[] for _ in self.group_names]
        for tensor in self.tensors.values():
            for dim, positions in enumerate(tensor.dims):
                if positions is not None:
                    for g, index in site_indices(positions):
                        sites[g].append(Site(tensor.name, dim, index))
        return MappingProxyType(
            {
                name: ChannelGroup(name, int(width), tuple(sites[g]))
                for g, (name, width) in enumerate(zip(self.group_names, self.group_widths, strict=True))
            }
        )

    @property
    def full(self) -> dict[str, int]:
        """The widths of the model as it is."""
        return {n: int(w) for n, w in zip(self.group_names, self.group_widths, strict=True)}

    def vector(self, widths: Widths | Sequence[Widths] | npt.ArrayLike | None = None) -> IntArray:
        """Turn widths into an integer array ``[..., groups]``; groups that are not named keep their full width.

        Raises:
            WidthsError: If a name is unknown or an array has the wrong number of columns.
        """
        if widths is None:
            return self._vector_of({})
        if isinstance(widths, Mapping):
            return self._vector_of(widths)
        if isinstance(widths, Sequence) and widths and isinstance(widths[0], Mapping):
            return np.stack([self._vector_of(w) for w in widths])  # type: ignore[arg-type]
        array = np.asarray(widths, dtype=np.int64)
        if array.shape[-1:] != (len(self.group_names),):
            n = len(self.group_names)
            raise WidthsError(f"width array has shape {array.shape}; the last dim must be {n} groups")
        return array

    def _vector_of(self, widths: Widths) -> IntArray:
        vector: IntArray = self.group_widths.copy()
        index = {name: g for g, name in enumerate(self.group_names)}
        for name, width in widths.items():
            if name not in index:
                raise WidthsError(f"unknown channel group '{name}': {close_matches(name, index)}")
            vector[index[name]] = width
        return vector

    def macs(self, widths: Any = None) -> Any:
        """Multiply-adds per example, exact; one multiply-add counts 1, norms, biases and activations count 0.

        Args:
            widths: A mapping, a sequence of mappings, or an integer array ``[..., groups]``; ``None`` is full width.

        Returns:
            An ``int`` for one width vector, else an int64 array ``[...]``.
        """
        return self.cost.macs(self.vector(widths))

    def params(self, widths: Any = None) -> Any:
        """Number of parameters, exact; takes and returns what :meth:`macs` does."""
        return self.cost.params(self.vector(widths))

    def memory(self, widths: Any = None, *, batch: int = 1, dtype: str | None = None) -> Any:
        """Bytes of weights plus peak activations of one forward pass, by the lifetimes of a run without gradients.

        Workspace that operators allocate and free while they run is not counted, except the indices of max pooling.

        Args:
            widths: As in :meth:`macs`.
            batch: Examples per pass.
            dtype: Type that the model is cast to, such as ``"bfloat16"``; as it is when not given.

        Returns:
            An ``int`` for one width vector, else an int64 array ``[...]``.

        Raises:
            BudgetError: If the model's run is not known at this batch size.
        """
        return self.memory_model.total(self.vector(widths), batch=batch, dtype=dtype)

    @cached_property
    def memory_model(self) -> MemoryModel:
        """Weights and activations apart, and where the peak is."""
        return MemoryModel(self.program, len(self.group_names))

    def sensitivity(self, widths: Any = None) -> npt.NDArray[np.float64]:
        """Return ``[groups]``: d MACs / d width of every group (CafeNet, Eq. 7)."""
        return self.cost.sensitivity(self.vector(widths))


def site_indices(positions: Positions) -> list[tuple[int, IntArray]]:
    """List ``(group, index [width, positions per unit])`` for every group that owns positions here."""
    found: list[tuple[int, IntArray]] = []
    for g in np.unique(positions.group[positions.group >= 0]):
        where = np.flatnonzero(positions.group == g)
        order = np.argsort(positions.rank[where], kind="stable")
        n_units = int(positions.rank[where].max()) + 1
        found.append((int(g), where[order].reshape(n_units, -1)))
    return found
