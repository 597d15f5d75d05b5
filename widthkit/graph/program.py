"""The traced run as a program: every operator call with its shapes, and the lifetime of every block of memory.

A program is pure data without a tensor of the model. Its sizes are affine in the widths. So memory and latency at any
widths and any batch size follow without running the model again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from widthkit.errors import BudgetError
from widthkit.graph.arrays import FloatArray, IntArray

MATRIX_PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum")
"""Names of ATen's matrix products."""


@dataclass(frozen=True)
class Dim:
    """The size of one dim of one tensor of the run.

    Args:
        form: ``[1 + groups]``: an affine function of the widths (constant, then slopes).
        growth: What every further example adds, as a share of the size in the traced run; 0 where the size does not
            depend on the batch.
    """

    form: IntArray
    growth: float = 0.0

    def scale(self, extra: int) -> float:
        """Return the factor on the size for ``extra`` more examples than in the traced run."""
        return 1.0 + self.growth * extra

    @property
    def varies(self) -> bool:
        """Whether any width changes this size."""
        return bool(self.form[1:].any())


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of one tensor of the run.

    Args:
        dims: The size of every dim.
        dtype: Name of the type, such as ``"float32"``.
    """

    dims: tuple[Dim, ...]
    dtype: str

    def numel(self, widths: IntArray, extra: int = 0) -> FloatArray:
        """Return ``[...]``: how many elements it has at widths ``[..., groups]``."""
        total = np.ones(widths.shape[:-1])
        for dim in self.dims:
            total = total * (dim.scale(extra) * (widths @ dim.form[1:] + dim.form[0]))
        return np.asarray(total)


@dataclass(frozen=True)
class Slot:
    """Replaces a tensor among the arguments of an operator: ``index`` is its number in :attr:`OpCall.inputs`."""

    index: int


@dataclass(frozen=True)
class OpCall:
    """One operator call.

    Args:
        module: Path of the module that ran it.
        operator: ATen name with overload, such as ``"aten::conv2d"`` or ``"aten::add_.Tensor"``.
        args: Positional arguments; tensors are replaced by :class:`Slot`.
        kwargs: Keyword arguments, as sorted pairs.
        inputs: The tensors among the arguments.
        outputs: The tensors that it returned.
        is_view: Whether it allocates nothing and writes nothing.
    """

    module: str
    operator: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    is_view: bool


@dataclass(frozen=True)
class Block:
    """One block of memory.

    Args:
        tensor: The tensor in it.
        first_call: The first call after which it is alive; 0 where it existed before the run.
        end_call: The first call after which it is freed; one past the last call where it survives.
        share: Its bytes over those of the tensor; above 1 where the tensor is a part of it.
    """

    tensor: TensorSpec
    first_call: int
    end_call: int
    share: float = 1.0


@dataclass(frozen=True)
class Program:
    """What a model does with one batch.

    Args:
        calls: Every operator call, in order.
        blocks: Every block of memory that the run allocated, and its inputs.
        weights: Parameters and buffers, each once.
        batch: Examples of the traced run.
        batch_error: Why the model does not run at other batch sizes; ``None`` where it does.
        example: The inputs of the run; tensors are replaced by :class:`Slot`.
        inputs: The tensors among the inputs.
    """

    calls: tuple[OpCall, ...]
    blocks: tuple[Block, ...]
    weights: tuple[TensorSpec, ...]
    batch: int
    batch_error: str | None
    example: tuple[Any, ...] = ()
    inputs: tuple[TensorSpec, ...] = ()

    def extra(self, batch: int) -> int:
        """Return how many more examples a batch has than the traced run.

        Raises:
            BudgetError: If the model does not run at another batch size than it was traced with.
        """
        if batch != self.batch and self.batch_error is not None:
            raise BudgetError(
                f"this model was traced at batch size {self.batch} and does not run alike at {2 * self.batch} "
                f"({self.batch_error}), so its cost at batch={batch} is not known; trace it with example_inputs of "
                "that batch size"
            )
        return batch - self.batch


def item_size(dtype: str) -> int:
    """Bytes of one element.

    >>> item_size("float32"), item_size("bfloat16"), item_size("int64"), item_size("bool")
    (4, 2, 8, 1)
    """
    return _ITEM_SIZES[dtype]


def is_floating(dtype: str) -> bool:
    """Whether ``model.to(dtype)`` converts tensors of this type."""
    return dtype.startswith(("float", "bfloat"))


_ITEM_SIZES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "complex64": 8,
    "complex128": 16,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


def fixed_tensor(sizes: Sequence[int], n_groups: int, dtype: str) -> TensorSpec:
    """Return the specification of a tensor that no width changes."""
    forms = []
    for size in sizes:
        form = np.zeros(1 + n_groups, dtype=np.int64)
        form[0] = size
        forms.append(Dim(form))
    return TensorSpec(tuple(forms), dtype)
