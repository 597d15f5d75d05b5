"""Judge many sub-networks together: what one has computed, the next need not compute again.

Candidates of one greedy round differ from one another in one group each, so everything before a candidate's first
changed layer is the same for all of them. Nothing here knows of greedy or of parents: sub-networks are sorted so that
neighbours share long beginnings, and every operator call whose inputs are known to be the same is computed once. Losses
are bit-identical to those of separate runs, for the same operators run on the same values.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from widthkit.budget import memory_amount
from widthkit.errors import Option, OptionError
from widthkit.search.known import Known, Run
from widthkit.search.lineage import Memo, replace
from widthkit.supernet import Supernet
from widthkit.supernet.slices import Spec
from widthkit.train.modes import call_model

_STATISTICS = ("running_mean", "running_var")


def parse_memory(memory: str | int) -> int:
    """Read an amount of memory, in bytes.

    Raises:
        OptionError: If it is none.

    >>> parse_memory("2GB"), parse_memory("1.5 MB"), parse_memory(1000)
    (2000000000, 1500000, 1000)
    """
    if isinstance(memory, int) and memory >= 0:
        return memory
    amount = memory_amount(str(memory))
    if amount is None:
        raise OptionError(Option("memory", memory), ": this is no amount; write it like 2GB or 500MiB")
    return int(amount)


def sharing_order(net: Supernet, vectors: Sequence[Mapping[str, int]]) -> list[int]:
    """Order width vectors so that neighbours agree in as many first groups as possible.

    Groups are in the order of the traced run. With all candidates of a greedy round the one that changes the first
    layer comes first.
    """
    keys = [[int(v.get(g.name, g.width)) for g in net.space.groups] for v in vectors]
    return sorted(range(len(vectors)), key=lambda i: (keys[i], i))


class Sharing:
    """The sub-networks of a list of width vectors, and what is known of their runs.

    Args:
        net: The supernet.
        vectors: Width vectors, in the order in which they will be run.
        memory: Most bytes of values that are kept from one run for the next, over all batches.

    Attributes:
        crowded: Whether values had to be given up.
        peak: The most bytes that were kept.
        n_paths: Paths of every width vector.
    """

    def __init__(self, net: Supernet, vectors: Sequence[Mapping[str, int]], memory: int) -> None:
        self.memory = memory
        self.crowded = False
        self.peak = 0
        self._net = net
        self._n = len(vectors)
        paths = [net.paths(v) for v in vectors]
        # Prepared once: there may be more of them than the supernet remembers.
        self._prepared = [[net.prepare(units) for units in path] for path in paths]
        self.n_paths = [len(path) for path in paths]
        self._sharers = [
            _sharers([p[path] if path < len(p) else None for p in self._prepared]) for path in range(max(self.n_paths))
        ]
        self._memos: dict[tuple[int, int], Memo] = {}

    def run(self, who: int, path: int, batch: int, inputs: Any) -> Any:
        """Run one sub-network on a batch and return its outputs.

        Args:
            who: Place of the width vector in the list; rising from call to call for a path and batch.
            path: Which of its paths.
            batch: Number of the batch.
            inputs: The batch.
        """
        memo = self._memos.setdefault((path, batch), Memo(self._sharers[path], self._n))
        memo.room = self.memory - sum(m.bytes for m in self._memos.values() if m is not memo)
        run = Run(memo, who)
        with self._net.slices.narrowed(self._prepared[who][path]) as model:
            outputs = self._outputs(run, model, inputs)
        run.settle()
        memo.turn()
        self.peak = max(self.peak, sum(m.bytes for m in self._memos.values()))
        self.crowded |= memo.crowded
        return outputs

    def close(self) -> None:
        """Forget everything."""
        for path, batch in list(self._memos):
            self.drop(path, batch)

    def drop(self, path: int, batch: int) -> None:
        """Forget all about a batch on a path."""
        memo = self._memos.pop((path, batch), None)
        if memo is not None:
            memo.held.clear()  # they know the run, which knows the memo
        self.crowded = False
        for memo in self._memos.values():
            memo.crowded = False

    def _outputs(self, run: Run, model: nn.Module, inputs: Any) -> Any:
        count = iter(range(1 << 30))

        def part(name: str, module: nn.Module, tensor: Tensor) -> Tensor:
            if not isinstance(module, _BatchNorm):
                return run.leaf(name, tensor)
            last = name.rpartition(".")[2]
            # The counter of batches is counted on as usual: nothing else reads it.
            if last == "num_batches_tracked":
                return tensor
            return run.leaf(name, tensor, "statistics" if last in _STATISTICS else "leaf")

        with self._net.slices.replaced(part):
            known = replace(inputs, Tensor, lambda t: run.leaf(f"input {next(count)}", t))
            outputs = call_model(model, known)
            return replace(outputs, Tensor, lambda t: t.value() if isinstance(t, Known) else t)


def _sharers(prepared: Sequence[Any]) -> dict[str, list[int]]:
    """Return, per tensor that any sub-network narrows, for each sub-network the bit set of those with equal slices."""
    slices: dict[str, dict[Hashable, int]] = {}
    own: list[dict[str, Hashable]] = []
    for who, one in enumerate(prepared):
        # A width vector may have fewer paths than others; then nobody asks for its bit.
        own.append({} if one is None else {name: _slice_name(spec) for name, spec in one.specs.items()})
        for name, key in own[-1].items():
            found = slices.setdefault(name, {})
            found[key] = found.get(key, 0) | 1 << who
    everyone = (1 << len(prepared)) - 1
    for found in slices.values():
        whole = everyone
        for bits in found.values():
            whole &= ~bits
        found[None] = whole
    return {name: [found[mine.get(name)] for mine in own] for name, found in slices.items()}


def _slice_name(spec: Spec) -> Hashable:
    return tuple(
        (dim, (where.start, where.stop) if isinstance(where, slice) else where.numpy().tobytes()) for dim, where in spec
    )


def generator_states(device: torch.device) -> tuple[Any, ...]:
    """Return the states of the generators that a model on this device may draw from."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def same_states(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether nothing was drawn between two calls of :func:`generator_states`."""
    numpy = all(np.array_equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    cuda = one[3] is None or torch.equal(one[3], other[3])
    return one[0] == other[0] and numpy and torch.equal(one[2], other[2]) and cuda


def restore_generators(device: torch.device, states: tuple[Any, ...]) -> None:
    """Put generator states back."""
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state(states[3], device)
