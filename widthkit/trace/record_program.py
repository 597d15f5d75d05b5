"""Turn a traced run into a :class:`Program`: operators, sizes as functions of the widths, lifetimes of memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from widthkit.graph import ChannelGraph, IntArray
from widthkit.graph.program import Block, Dim, OpCall, Program, Slot, TensorSpec, fixed_tensor, item_size
from widthkit.modules.clone import named_tensors
from widthkit.trace.build import affine_forms
from widthkit.trace.candidate import Candidate
from widthkit.trace.context import flat_tensors
from widthkit.trace.inputs import Inputs
from widthkit.trace.labels import Labels
from widthkit.trace.lifetimes import BlockLifetime, Lifetimes, record_lifetimes

_WORKSPACE = {"aten.max_pool2d.default": "int64", "aten.max_pool3d.default": "int64"}
"""Operators that allocate a second tensor of the size of their result while they run (the indices of the maxima)."""


def with_program(candidate: Candidate, graph: ChannelGraph) -> ChannelGraph:
    """Return the graph with the program of its run.

    The model runs once more, at twice the batch size where it can, else at the same one. Where both runs fail or call
    other operators, the graph gets a note instead of a program.
    """
    names = [str(call.func) for call in candidate.recording.calls]
    batch_error: str | None = None
    reason = ""
    for doubled in (True, False):
        inputs = double_batch(candidate.inputs) if doubled else candidate.inputs
        try:
            lifetimes = record_lifetimes(candidate.model, inputs, candidate.fake_values)
        except Exception as error:  # a model may raise anything at a batch size that it was not made for
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            reason = f"a second run of the model fails ({failure})"
        else:
            numbers = align(names, lifetimes.names)
            if numbers is not None:
                forms = affine_forms(candidate.solve(), candidate.units())
                builder = _Builder(candidate, graph, lifetimes, numbers, forms, batch_error)
                return dataclasses.replace(graph, program=builder.build())
            failure = "it calls different operators there"
            reason = "two runs of the model call different operators"
        batch_error = failure
    note = f"{reason}, so memory and latency of its widths are not known"
    return dataclasses.replace(graph, notes=(*graph.notes, note))


def align(traced: Sequence[str], repeated: Sequence[str]) -> list[int] | None:
    """Return the number in the traced run of every call of the repeated run; ``None`` where the runs differ.

    The traced run may call ``detach`` more often: PyTorch detaches new tensors that somebody else holds, and the
    recorder holds all of them.

    >>> align(["arange", "aten.detach.default", "mul"], ["arange", "mul"]), align(["mul"], ["add"])
    ([0, 2], None)
    """
    numbers: list[int] = []
    for number, name in enumerate(traced):
        if len(numbers) < len(repeated) and name == repeated[len(numbers)]:
            numbers.append(number)
        elif name != "aten.detach.default":
            return None
    return numbers if len(numbers) == len(repeated) else None


def double_batch(inputs: Inputs) -> Inputs:
    """Repeat every tensor of the inputs along dim 0."""
    twice: Inputs = tree_map_only(Tensor, lambda t: t.repeat(2, *(1,) * (t.ndim - 1)) if t.ndim else t, inputs)
    return twice


class _Builder:
    """Joins the labels of the traced run with the sizes and lifetimes of the repeated one.

    Args:
        candidate: The traced run.
        graph: Its graph.
        lifetimes: The repeated run.
        numbers: From :func:`align`.
        forms: From :func:`widthkit.trace.build.affine_forms`.
        batch_error: Why the model does not run at twice the batch size; ``None`` where the repeated run did.
    """

    def __init__(
        self,
        candidate: Candidate,
        graph: ChannelGraph,
        lifetimes: Lifetimes,
        numbers: Sequence[int],
        forms: Callable[[Labels], IntArray],
        batch_error: str | None,
    ) -> None:
        self.recording = candidate.recording
        self.model = candidate.model
        self.batch = candidate.batch
        self.example = candidate.inputs
        self.n_groups = len(graph.group_names)
        self.graph = graph
        self.lifetimes = lifetimes
        self.numbers = numbers
        self.batch_error = batch_error
        self._forms = forms
        self._cache: dict[int, IntArray] = {}
        self._dims: dict[Any, Dim] = {}

    def build(self) -> Program:
        by_call: dict[int, list[BlockLifetime]] = {}
        for block in self.lifetimes.blocks:
            by_call.setdefault(block.owner[0], []).append(block)
        calls: list[OpCall] = []
        blocks: list[Block] = []
        for number in range(len(self.lifetimes.names)):
            call = self._call(number)
            for block in by_call.get(number, []):
                place = block.owner[1]
                blocks.append(self._block(block, call.outputs[place] if place >= 0 else call.inputs[-1 - place]))
            blocks += _workspace(call, number)
            calls.append(call)
        tensors = flat_tensors(self.example)
        repeated = tensors if self.batch_error is not None else flat_tensors(double_batch(self.example))
        inputs = tuple(self._spec(t, tuple(r.shape)) for t, r in zip(tensors, repeated, strict=True))
        template = _template(self.example, iter(range(len(tensors))))
        return Program(tuple(calls), tuple(blocks), self._weights(), self.batch, self.batch_error, template, inputs)

    def _call(self, number: int) -> OpCall:
        traced = self.recording.calls[self.numbers[number]]
        given, returned = flat_tensors((traced.args, traced.kwargs)), flat_tensors((traced.out,))
        inputs = zip(given, self.lifetimes.inputs[number], strict=True)
        outputs = zip(returned, self.lifetimes.outputs[number], strict=True)
        args, kwargs = _template((traced.args, traced.kwargs), iter(range(len(given))))
        return OpCall(
            traced.path,
            str(traced.func),
            args,
            tuple(sorted(kwargs.items())),
            tuple(self._spec(t, shape) for t, shape in inputs),
            tuple(self._spec(t, shape) for t, shape in outputs),
            self.lifetimes.is_view[number],
        )

    def _block(self, block: BlockLifetime, spec: TensorSpec) -> Block:
        extra = self.batch if self.batch_error is None else 0
        own = float(spec.numel(self.graph.group_widths, extra)) * item_size(spec.dtype)
        end = len(self.lifetimes.names) if block.end_call is None else block.end_call
        return Block(spec, block.first_call, end, block.n_bytes / own if own else 1.0)

    def _spec(self, tensor: Tensor, repeated: tuple[int, ...]) -> TensorSpec:
        """Describe a tensor of the traced run, given its shape in the repeated run."""
        dims = []
        for labels, size, other in zip(self.recording.dims_of(tensor), tensor.shape, repeated, strict=True):
            key = (id(labels) if labels is not None else None, size, other)
            if key not in self._dims:
                growth = (other / size - 1) / self.batch if self.batch_error is None and size else 0.0
                self._dims[key] = Dim(self._form(labels, size), growth)
            dims.append(self._dims[key])
        return TensorSpec(tuple(dims), str(tensor.dtype).removeprefix("torch."))

    def _form(self, labels: Labels | None, size: int) -> IntArray:
        if labels is None:
            form = np.zeros(1 + self.n_groups, dtype=np.int64)
            form[0] = size
            return form
        if id(labels) not in self._cache:
            self._cache[id(labels)] = self._forms(labels)
        return self._cache[id(labels)]

    def _weights(self) -> tuple[TensorSpec, ...]:
        found = []
        for name, tensor in named_tensors(self.model).items():
            spec = fixed_tensor(tuple(tensor.shape), self.n_groups, str(tensor.dtype).removeprefix("torch."))
            dims = list(spec.dims)
            for dim, positions in enumerate(self.graph.tensors[name].dims):
                if positions is not None:
                    dims[dim] = Dim(positions.affine(self.n_groups, self.graph.group_widths))
            found.append(TensorSpec(tuple(dims), spec.dtype))
        return tuple(found)


def _workspace(call: OpCall, number: int) -> list[Block]:
    dtype = _WORKSPACE.get(call.operator)
    return [] if dtype is None else [Block(TensorSpec(call.outputs[0].dims, dtype), number, number + 1)]


def _template(value: Any, numbers: Iterator[int]) -> Any:
    """Replace tensors by numbered slots, in the order of :func:`flat_tensors`; lists become tuples."""
    if isinstance(value, torch.Tensor):
        return Slot(next(numbers))
    if isinstance(value, (tuple, list)):
        return tuple(_template(item, numbers) for item in value)
    if isinstance(value, dict):
        return type(value)((key, _template(item, numbers)) for key, item in value.items())
    return value
