"""Run a new network once before it is handed out: on the meta device, so without memory or arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from widthkit.errors import ExportError, one_line
from widthkit.graph.program import Program, Slot, TensorSpec, is_floating
from widthkit.modules.clone import meta_clone, real_clone
from widthkit.trace.fake_values import FakeValueMode
from widthkit.trace.inputs import needs_values
from widthkit.trace.outputs import Outputs
from widthkit.trace.recorder import call_model, same_operators


def check_runs(net: nn.Module, full: nn.Module, program: Program | None) -> None:
    """Refuse a network that raises on the example input of the trace.

    A model whose control flow depends on values runs on the CPU, with made-up values for expensive operators. Where the
    trace kept no example input, or the full model does not run like this either, nothing is said.

    Args:
        net: The exported network.
        full: The network that it was made from.
        program: The program of the trace, which holds the shapes of its example input.

    Raises:
        ExportError: With what the network raised.
    """
    if program is None or not program.inputs:
        return
    failure = _failure(net, program)
    if failure is not None and _failure(full, program) is None:
        raise ExportError(
            f"the exported {type(net).__name__} does not run at these widths ({type(failure).__name__}: "
            f"{one_line(failure)}); trace the model with freeze= for the module that this names"
        )


def _failure(net: nn.Module, program: Program) -> Exception | None:
    """Return what the network raises, ``None`` if it runs."""
    try:
        _run(meta_clone(net), program, "meta")
    except Exception as error:  # a model may raise anything
        if not needs_values(error):
            return error
    else:
        return None
    try:
        _run(real_clone(net).cpu(), program, "cpu")
    except Exception as error:  # a model may raise anything
        return error
    return None


def _run(net: nn.Module, program: Program, device: str) -> None:
    tensors = [_example(spec, device) for spec in program.inputs]
    inputs = _filled(program.example, tensors)
    with same_operators(inputs), FakeValueMode(fake_values=device == "cpu"):
        Outputs.of(call_model(net.eval(), inputs))  # a generator runs only when it is used


def _example(spec: TensorSpec, device: str) -> Tensor:
    """Return positive floats, or zeros for integers, which are valid indices."""
    shape = [int(dim.form[0]) for dim in spec.dims]
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if device == "meta" or not is_floating(spec.dtype):
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _filled(value: Any, tensors: Sequence[Tensor]) -> Any:
    """Put tensors into the slots of a nested example."""
    if isinstance(value, Slot):
        return tensors[value.index]
    if isinstance(value, tuple):
        return tuple(_filled(item, tensors) for item in value)
    if isinstance(value, dict):
        return type(value)((name, _filled(item, tensors)) for name, item in value.items())
    return value
