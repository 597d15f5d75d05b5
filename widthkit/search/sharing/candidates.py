"""Run many sub-networks on one batch: what one has computed, the next need not compute again.

Where candidates differ from one another in one group each, everything before a candidate's first changed layer is the
same for all of them. Sub-networks are sorted so that neighbours share long beginnings, and every operator call whose
inputs are known to be the same is computed once. Losses are bit-identical to those of separate runs, because the same
operators run on the same values.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from widthkit.graph import IntArray
from widthkit.search.sharing.memo import Memo
from widthkit.search.sharing.shared_run import SharedRun
from widthkit.search.sharing.stand_in import StandIn
from widthkit.search.sharing.tree import replace
from widthkit.search.sharing.writes import write
from widthkit.supernet import Supernet
from widthkit.supernet.slices import Spec
from widthkit.train.modes import call_model

_STATISTICS = ("running_mean", "running_var")


def sharing_order(net: Supernet, vectors: Sequence[Mapping[str, int]]) -> list[int]:
    """Order width vectors so that neighbours agree in as many first groups as possible.

    Groups are in the order of the traced run. Of candidates that narrow one group each, the one that changes the first
    layer comes first.
    """
    keys = [[int(v.get(g.name, g.width)) for g in net.space.groups] for v in vectors]
    return sorted(range(len(vectors)), key=lambda i: (keys[i], i))


class Candidates:
    """Width vectors whose sub-networks share what they have in common.

    Args:
        net: The supernet.
        paths: Per width vector, in the order in which they will be run, the units of its sub-networks.
        memory: Most bytes of values that are kept from one run for the next, over all batches and paths.

    Attributes:
        crowded: Whether a value was given up for lack of memory.
        peak_bytes: The most that was kept.
    """

    def __init__(self, net: Supernet, paths: Sequence[Sequence[Mapping[str, IntArray]]], memory: int) -> None:
        self.memory = memory
        self.crowded = False
        self.peak_bytes = 0
        self._net = net
        # Prepared once: there may be more of them than the supernet remembers.
        self._prepared = [[net.prepare(units) for units in path] for path in paths]
        most = max(map(len, paths))
        self._sharers = [_sharers([p[i] if i < len(p) else None for p in self._prepared]) for i in range(most)]
        self._memos: dict[tuple[int, int], Memo] = {}

    def run(self, who: int, path: int, batch: int, inputs: Any) -> Any:
        """Run one sub-network on a batch and return its outputs.

        Args:
            who: Place of the width vector in the list; rising from call to call for a path and batch.
            path: Which of its paths.
            batch: Number of the batch.
            inputs: The batch.

        Raises:
            Unsafe: If the model does something whose result sharing would change.
        """
        memo = self._memos.setdefault((path, batch), Memo(self._sharers[path], len(self._prepared)))
        memo.room = self.memory - sum(m.bytes for m in self._memos.values() if m is not memo)
        run = SharedRun(memo, who, write)
        with self._net.slices.narrowed(self._prepared[who][path]) as model:
            outputs = self._outputs(run, model, inputs)
        run.finish()
        memo.end_run()
        self.peak_bytes = max(self.peak_bytes, sum(m.bytes for m in self._memos.values()))
        self.crowded |= memo.crowded
        return outputs

    def forget(self) -> None:
        """Drop all values; later runs start afresh."""
        for memo in self._memos.values():
            memo.clear()
        self._memos.clear()
        self.crowded = False

    def _outputs(self, run: SharedRun, model: nn.Module, inputs: Any) -> Any:
        number = count()

        def part(name: str, module: nn.Module, tensor: Tensor) -> Tensor:
            if not isinstance(module, _BatchNorm):
                return run.leaf(name, tensor)
            last = name.rpartition(".")[2]
            # The counter of batches is counted on as usual: nothing else reads it.
            if last == "num_batches_tracked":
                return tensor
            return run.leaf(name, tensor, "statistics" if last in _STATISTICS else "leaf")

        with self._net.slices.replaced(part):
            stand_ins = replace(inputs, Tensor, lambda t: run.leaf(f"input {next(number)}", t))
            outputs = call_model(model, stand_ins)
            return replace(outputs, Tensor, lambda t: t.value() if isinstance(t, StandIn) else t)


def _sharers(prepared: Sequence[Any]) -> dict[str, list[int]]:
    """Return, per tensor that any sub-network narrows, for each sub-network the bit set of those with equal slices."""
    slices: dict[str, dict[Hashable, int]] = {}
    own: list[dict[str, Hashable]] = []
    for who, one in enumerate(prepared):
        # A width vector may have fewer paths than others; its bit is then unused.
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
