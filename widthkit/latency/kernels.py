"""List the operators of a program that take time, and the sizes on which their time depends.

A *kernel* is an operator in which only the channel counts are open. Its type, kernel size, stride, image size, batch
size, number type and memory format are fixed. The open sizes are numbered, and equal sizes have one number: a plain
convolution has two open sizes; one with as many outputs as inputs has one, and so has a depthwise one. Different
networks contain the same kernels, so each kernel is measured once per device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from widthkit.graph import FloatArray, IntArray
from widthkit.graph.program import MATRIX_PRODUCTS, OpCall, Program, TensorSpec, is_floating
from widthkit.latency.conditions import Conditions

Shape = tuple["int | str", ...]
CONTRACTIONS = ("conv", *MATRIX_PRODUCTS, "scaled_dot_product", "mv", "dot")
_SIZE_ARGUMENTS = {"groups": "conv", "normalized_shape": "layer_norm"}
"""Arguments that repeat a size of a tensor, and the operators that have them."""


@dataclass(frozen=True)
class Kernel:
    """One operator with some open sizes.

    Args:
        operator: ATen name with overload.
        args: Positional arguments, as in :class:`widthkit.graph.program.OpCall`.
        kwargs: Keyword arguments, as sorted pairs.
        inputs: Shape and type of every tensor among them; an open size is ``"n0"``, ``"n1"``...
        outputs: The same of the results.
        conditions: Kind of device and memory format, as text; batch size and number types are in ``inputs``.
    """

    operator: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    inputs: tuple[tuple[Shape, str], ...]
    outputs: tuple[tuple[Shape, str], ...]
    conditions: str

    @property
    def base(self) -> str:
        """The operator's bare name: ``conv2d``, ``add_``."""
        return self.operator.split(".")[1]

    @property
    def contracts(self) -> bool:
        """Whether its time grows with a product of sizes."""
        return self.base.startswith(CONTRACTIONS)

    @property
    def copies(self) -> bool:
        """Whether it copies only an input that lies in another order in memory, which a run alone cannot show."""
        return self.base in ("contiguous", "reshape", "flatten", "_reshape_copy")

    @property
    def n_sizes(self) -> int:
        """Number of open sizes."""
        shapes = [s for shape, _ in (*self.inputs, *self.outputs) for s in shape if isinstance(s, str)]
        return max((int(s[1:]) + 1 for s in shapes), default=0)

    @property
    def label(self) -> str:
        """Operator and shapes, for people."""
        return f"{self.base}({', '.join('x'.join(map(str, shape)) for shape, _ in self.inputs)})"

    @property
    def key(self) -> str:
        """A short hash of everything above."""
        text = json.dumps([self.operator, repr(self.args), repr(self.kwargs), self.inputs, self.outputs])
        return hashlib.sha256(f"{text} {self.conditions}".encode()).hexdigest()[:24]


@dataclass(frozen=True)
class KernelUse:
    """The use of a kernel in a network.

    Args:
        kernel: The kernel.
        forms: ``[sizes, 1 + groups]``: its open sizes as affine functions of the widths, at the given batch size.
        count: Number of such calls in the network.
    """

    kernel: Kernel
    forms: FloatArray
    count: int

    def sizes(self, widths: IntArray) -> IntArray:
        """Return ``[..., sizes]`` at widths ``[..., groups]``."""
        return np.asarray(np.rint(widths @ self.forms[:, 1:].T + self.forms[:, 0]), dtype=np.int64)


def kernel_uses(program: Program, conditions: Conditions) -> list[KernelUse]:
    """List the kernels that a network runs under the given conditions; equal uses are counted together."""
    extra = program.extra(conditions.batch)
    found: dict[tuple[str, bytes], KernelUse] = {}
    for call in program.calls:
        if call.is_view or not any(is_floating(t.dtype) for t in call.inputs):
            continue  # views and constants: their time belongs to the overhead that whole networks show
        use = _use(call, conditions, extra)
        key = use.kernel.key, use.forms.tobytes()
        before = found.get(key)
        found[key] = KernelUse(use.kernel, use.forms, 1 + (before.count if before else 0))
    return list(found.values())


def _use(call: OpCall, conditions: Conditions, extra: int) -> KernelUse:
    rows: dict[bytes, int] = {}
    forms: list[FloatArray] = []

    def shape(spec: TensorSpec) -> tuple[Shape, str]:
        sizes: list[int | str] = []
        for dim in spec.dims:
            form = np.asarray(dim.form * dim.scale(extra), dtype=np.float64)
            if not dim.varies:
                sizes.append(round(float(form[0])))
                continue
            place = rows.setdefault(form.tobytes(), len(forms))
            if place == len(forms):
                forms.append(form)
            sizes.append(f"n{place}")
        floating = is_floating(spec.dtype)
        return tuple(sizes), conditions.dtype or spec.dtype if floating else spec.dtype

    inputs, outputs = tuple(map(shape, call.inputs)), tuple(map(shape, call.outputs))
    args, kwargs = _without_sizes(call)
    kind = (conditions.device or "cpu").partition(":")[0]
    text = f"{kind} {'channels_last' if conditions.channels_last else 'contiguous'}"
    kernel = Kernel(call.operator, args, kwargs, inputs, outputs, text)
    width = len(call.inputs[0].dims[0].form) if call.inputs and call.inputs[0].dims else 1
    return KernelUse(kernel, np.stack(forms) if forms else np.zeros((0, width)), 1)


def _without_sizes(call: OpCall) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]:
    """Remove arguments that repeat a size; :mod:`widthkit.latency.measure` inserts them again."""
    names = argument_names(call.operator)
    args = tuple(None if _repeats_size(n, call.operator) else a for n, a in zip(names, call.args, strict=False))
    kwargs = tuple((n, None if _repeats_size(n, call.operator) else v) for n, v in call.kwargs)
    return args, kwargs


def _repeats_size(name: str, operator: str) -> bool:
    base = operator.split(".")[1]
    return name in _SIZE_ARGUMENTS and base.startswith(_SIZE_ARGUMENTS[name]) and "transpose" not in base


def argument_names(operator: str) -> Sequence[str]:
    """Return the names of an operator's arguments, in order."""
    return [a.name for a in operator_schema(operator).arguments]


def operator_schema(operator: str) -> Any:
    """Return an operator's schema; PyTorch has no public name for it."""
    return find_operator(operator)._schema


def find_operator(operator: str) -> Any:
    """Return the overload called ``namespace.name.overload``."""
    found: Any = torch.ops
    for part in operator.split("."):
        found = getattr(found, part)
    return found
