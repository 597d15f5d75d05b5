"""Turn a traced run into a program: operators, sizes as functions of the widths, lifetimes of memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from widthkit.graph import ChannelGraph, IntArray
from widthkit.graph.program import Block, Dim, OpCall, Program, Slot, TensorSpec, fixed, item_size
from widthkit.modules.clone import named_tensors
from widthkit.trace.build import affine_forms
from widthkit.trace.candidate import Draft
from widthkit.trace.context import flat_tensors
from widthkit.trace.inputs import Inputs
from widthkit.trace.labels import Labels
from widthkit.trace.watch import Seen, SeenBlock, watch

_SCRATCH = {"aten.max_pool2d.default": "int64", "aten.max_pool3d.default": "int64"}
"""Operators that make a second tensor of the size of their result for as long as they run: the maxima's indices."""


def with_program(draft: Draft, graph: ChannelGraph) -> ChannelGraph:
    """Return the graph with the program of its run; without one where the model does not run twice alike."""
    names = [str(func) for func, _, _, _ in draft.run.calls[: len(draft.run.trail)]]
    for doubled in (True, False):
        seen = _watched(draft, double_batch(draft.inputs) if doubled else draft.inputs)
        numbers = None if seen is None else align(names, seen.names)
        if seen is not None and numbers is not None:
            forms = affine_forms(draft.solve(), draft.units())
            return dataclasses.replace(graph, program=_Builder(draft, graph, seen, numbers, forms, doubled).build())
    note = "two runs of the model call different operators, so memory and latency of its widths are not known"
    return dataclasses.replace(graph, notes=(*graph.notes, note))


def align(traced: Sequence[str], watched: Sequence[str]) -> list[int] | None:
    """Return the number in the traced run of every call of the watched one; ``None`` where the runs differ.

    The traced run may detach more: PyTorch does so with new tensors that somebody else holds, as the recorder does.

    >>> align(["arange", "aten.detach.default", "mul"], ["arange", "mul"]), align(["mul"], ["add"])
    ([0, 2], None)
    """
    numbers: list[int] = []
    for number, name in enumerate(traced):
        if len(numbers) < len(watched) and name == watched[len(numbers)]:
            numbers.append(number)
        elif name != "aten.detach.default":
            return None
    return numbers if len(numbers) == len(watched) else None


def double_batch(inputs: Inputs) -> Inputs:
    """Repeat every tensor of the inputs along dim 0."""
    twice: Inputs = tree_map_only(Tensor, lambda t: t.repeat(2, *(1,) * (t.ndim - 1)) if t.ndim else t, inputs)
    return twice


def _watched(draft: Draft, inputs: Inputs) -> Seen | None:
    try:
        return watch(draft.model, inputs, draft.hollow)
    except Exception:  # whatever a model may raise at a batch size that it was not made for
        return None


class _Builder:
    """Joins the labels of the traced run with the sizes and lifetimes of the watched one."""

    def __init__(
        self,
        draft: Draft,
        graph: ChannelGraph,
        seen: Seen,
        numbers: Sequence[int],
        forms: Callable[[Labels], IntArray],
        doubled: bool,
    ) -> None:
        self.run = draft.run
        self.model = draft.model
        self.batch = draft.batch
        self.example = draft.inputs
        self.n_groups = len(graph.group_names)
        self.graph = graph
        self.seen = seen
        self.numbers = numbers
        self.doubled = doubled
        self._forms = forms
        self._cache: dict[int, IntArray] = {}
        self._dims: dict[Any, Dim] = {}

    def build(self) -> Program:
        calls, blocks = [], []
        by_call: dict[int, list[SeenBlock]] = {}
        for block in self.seen.blocks:
            by_call.setdefault(block.owner[0], []).append(block)
        for number in range(len(self.seen.names)):
            func, args, kwargs, out = self.run.calls[self.numbers[number]]
            given, made = flat_tensors((args, kwargs)), flat_tensors((out,))
            inputs = tuple(self._spec(t, s) for t, s in zip(given, self.seen.inputs[number], strict=True))
            outputs = tuple(self._spec(t, s) for t, s in zip(made, self.seen.outputs[number], strict=True))
            counter = iter(range(len(given)))
            plain_args, plain_kwargs = _template((args, kwargs), counter)
            calls.append(
                OpCall(
                    self.run.trail[self.numbers[number]].path,
                    str(func),
                    plain_args,
                    tuple(sorted(plain_kwargs.items())),
                    inputs,
                    outputs,
                    self.seen.moves_nothing[number],
                )
            )
            for block in by_call.get(number, []):
                position = block.owner[1]
                blocks.append(self._block(block, outputs[position] if position >= 0 else inputs[-1 - position]))
            blocks += _scratch(calls[-1], number)
        example = self.example
        tensors = flat_tensors(example)
        other = [tuple(t.shape) for t in flat_tensors(double_batch(example))] if self.doubled else None
        inputs = tuple(self._spec(t, other[i] if other is not None else tuple(t.shape)) for i, t in enumerate(tensors))
        return Program(
            tuple(calls),
            tuple(blocks),
            self._weights(),
            self.batch,
            self.doubled,
            _template(example, iter(range(len(tensors)))),
            inputs,
        )

    def _block(self, block: SeenBlock, spec: TensorSpec) -> Block:
        extra = self.batch if self.doubled else 0
        own = float(spec.numel(self.graph.group_widths, extra)) * item_size(spec.dtype)
        died = len(self.seen.names) if block.died is None else block.died
        return Block(spec, block.born, died, block.n_bytes / own if own else 1.0)

    def _spec(self, tensor: Tensor, seen: tuple[int, ...]) -> TensorSpec:
        dims = []
        for labels, size, other in zip(self.run.dims_of(tensor), tensor.shape, seen, strict=True):
            key = (id(labels) if labels is not None else None, size, other)
            if key not in self._dims:
                growth = (other / size - 1) / self.batch if self.doubled and size else 0.0
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
            spec = fixed(tuple(tensor.shape), self.n_groups, str(tensor.dtype).removeprefix("torch."))
            dims = list(spec.dims)
            for dim, positions in enumerate(self.graph.tensors[name].dims):
                if positions is not None:
                    dims[dim] = Dim(positions.affine(self.n_groups, self.graph.group_widths))
            found.append(TensorSpec(tuple(dims), spec.dtype))
        return tuple(found)


def _scratch(call: OpCall, number: int) -> list[Block]:
    dtype = _SCRATCH.get(call.operator)
    return [] if dtype is None else [Block(TensorSpec(call.outputs[0].dims, dtype), number, number + 1)]


def _template(value: Any, counter: Any) -> Any:
    """Replace tensors by numbered slots, in the order of :func:`flat_tensors`; lists become tuples."""
    if isinstance(value, torch.Tensor):
        return Slot(next(counter))
    if isinstance(value, (tuple, list)):
        return tuple(_template(item, counter) for item in value)
    if isinstance(value, dict):
        return type(value)((key, _template(item, counter)) for key, item in value.items())
    return value
