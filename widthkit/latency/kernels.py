"""Which operators of a program cost time, and on which sizes their time depends.

A *kernel* is an operator with everything fixed but the channel counts: type, kernel size, stride, image size, batch
size, number type, memory format. Its sizes are numbered, equal ones alike: a square convolution has one, a depthwise
one too, a plain one two. Networks share kernels, so that a kernel is measured once per device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from widthkit.graph.program import MATRIX_PRODUCTS, OpCall, Program, TensorSpec, is_floating
from widthkit.latency.conditions import Conditions

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Shape = tuple["int | str", ...]
CONTRACTIONS = ("conv", *MATRIX_PRODUCTS, "scaled_dot_product", "mv", "dot")
_FOLLOWS = {"groups": "conv", "normalized_shape": "layer_norm"}
"""Arguments that follow the sizes, and the operators that have them."""


@dataclass(frozen=True)
class Kernel:
    """One operator with some sizes left open.

    Args:
        operator: ATen name with overload.
        args: Positional and keyword arguments as :class:`widthkit.graph.program.OpCall` has them.
        kwargs: Keyword arguments.
        inputs: Shape and type of every tensor among them; a size that varies is ``"n0"``, ``"n1"``...
        outputs: The same of the results.
        conditions: Kind of device and memory format, as text; batch size and types are in the shapes.
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
        """Whether it copies only where its input lies in memory in another order, which a replay would not see."""
        return self.base in ("contiguous", "reshape", "flatten", "_reshape_copy")

    @property
    def n_sizes(self) -> int:
        """How many sizes are open."""
        shapes = [s for shape, _ in (*self.inputs, *self.outputs) for s in shape if isinstance(s, str)]
        return max((int(s[1:]) + 1 for s in shapes), default=0)

    @property
    def label(self) -> str:
        """For people: operator and shapes."""
        return f"{self.base}({', '.join('x'.join(map(str, shape)) for shape, _ in self.inputs)})"

    @property
    def key(self) -> str:
        """A short hash of all of it."""
        text = json.dumps([self.operator, repr(self.args), repr(self.kwargs), self.inputs, self.outputs])
        return hashlib.sha256(f"{text} {self.conditions}".encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Use:
    """A kernel in a network.

    Args:
        kernel: The kernel.
        forms: ``[sizes, 1 + groups]``: its sizes as functions of the widths, the batch size worked in.
        count: How many calls of the network are this one.
    """

    kernel: Kernel
    forms: FloatArray
    count: int

    def sizes(self, widths: IntArray) -> IntArray:
        """Return ``[..., sizes]`` at widths ``[..., groups]``."""
        return np.asarray(np.rint(widths @ self.forms[:, 1:].T + self.forms[:, 0]), dtype=np.int64)


def uses_of(program: Program, conditions: Conditions) -> list[Use]:
    """List the kernels that a network runs under the given conditions, equal uses together."""
    extra = program.extra(conditions.batch)
    found: dict[tuple[str, bytes], Use] = {}
    for call in program.calls:
        if call.is_view or not any(is_floating(t.dtype) for t in call.inputs):
            continue  # views and constants: their time is part of the overhead that whole networks tell
        use = _use(call, conditions, extra)
        key = use.kernel.key, use.forms.tobytes()
        before = found.get(key)
        found[key] = Use(use.kernel, use.forms, 1 + (before.count if before else 0))
    return list(found.values())


def _use(call: OpCall, conditions: Conditions, extra: int) -> Use:
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
    return Use(kernel, np.stack(forms) if forms else np.zeros((0, width)), 1)


def _without_sizes(call: OpCall) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]:
    """Take out arguments that follow the sizes; :mod:`widthkit.latency.replay` puts them in again."""
    names = argument_names(call.operator)
    args = tuple(None if _follows(n, call.operator) else a for n, a in zip(names, call.args, strict=False))
    kwargs = tuple((n, None if _follows(n, call.operator) else v) for n, v in call.kwargs)
    return args, kwargs


def _follows(name: str, operator: str) -> bool:
    base = operator.split(".")[1]
    return name in _FOLLOWS and base.startswith(_FOLLOWS[name]) and "transpose" not in base


def argument_names(operator: str) -> Sequence[str]:
    """Return the names of an operator's arguments, in order."""
    return [a.name for a in find_operator(operator)._schema.arguments]


def find_operator(operator: str) -> Any:
    """Return the overload called ``namespace.name.overload``."""
    import torch

    found: Any = torch.ops
    for part in operator.split("."):
        found = getattr(found, part)
    return found
