"""Run a traced copy once more and watch its memory: which call makes a block, and when Python lets go of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from widthkit.modules.clone import named_tensors
from widthkit.trace.context import flat_tensors
from widthkit.trace.fake_values import result
from widthkit.trace.recorder import call

Shapes = tuple[tuple[int, ...], ...]


@dataclass
class SeenBlock:
    """One block of memory.

    Args:
        owner: ``(call, position)``: among the outputs of a call, or among its arguments with ``(call, -1 - position)``.
        n_bytes: Its size.
        born: The first call after which it is alive.
        died: The first call after which it is not; ``None`` where it survives.
    """

    owner: tuple[int, int]
    n_bytes: int
    born: int
    died: int | None = None


@dataclass
class Seen:
    """What one watched run did: per call its name and the shapes of arguments and outputs, and all blocks."""

    names: list[str] = field(default_factory=list)
    inputs: list[Shapes] = field(default_factory=list)
    outputs: list[Shapes] = field(default_factory=list)
    moves_nothing: list[bool] = field(default_factory=list)
    blocks: list[SeenBlock] = field(default_factory=list)


class Watch(TorchDispatchMode):
    """Keeps no tensor alive: a weak reference to every storage tells when it is gone.

    Args:
        resident: Tensors that were there before the run and are counted elsewhere.
        hollow: As the run was traced.
    """

    def __init__(self, resident: Iterable[Tensor], hollow: bool = False) -> None:
        super().__init__()
        self.hollow = hollow
        self.seen = Seen()
        self._known = {t.untyped_storage()._cdata for t in resident}
        self._alive: dict[int, tuple[StorageWeakRef, SeenBlock]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and note what came and what is gone."""
        kwargs = kwargs or {}
        number = len(self.seen.names)
        self._bury(number)
        given = flat_tensors((args, kwargs))
        for position, tensor in enumerate(given):
            self._meet(tensor, (number, -1 - position), born=0)
        out = result(func, args, kwargs, self.hollow)
        made = flat_tensors((out,))
        fresh = [self._meet(tensor, (number, position), born=number) for position, tensor in enumerate(made)]
        self.seen.names.append(str(func))
        self.seen.inputs.append(tuple(tuple(t.shape) for t in given))
        self.seen.outputs.append(tuple(tuple(t.shape) for t in made))
        self.seen.moves_nothing.append(not any(fresh) and not func._schema.is_mutable)
        return out

    def _bury(self, number: int) -> None:
        gone = [key for key, (reference, _) in self._alive.items() if reference.expired()]
        for key in gone:
            self._alive.pop(key)[1].died = number

    def _meet(self, tensor: Tensor, owner: tuple[int, int], born: int) -> bool:
        """Note the tensor's storage if it is new; return whether it is."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._alive:
            return False
        block = SeenBlock(owner, storage.nbytes(), born)
        self.seen.blocks.append(block)
        self._alive[key] = (StorageWeakRef(storage), block)
        return True


def watch(model: nn.Module, inputs: tuple[Any, ...], hollow: bool = False) -> Seen:
    """Run a copy of a model and return what its operators did with memory.

    Args:
        model: A copy in eval mode, on the device of the inputs.
        inputs: Example inputs; they stay alive, as they do for whoever calls a model.
        hollow: Do not compute convolutions and matrix products (:mod:`widthkit.trace.fake_values`).
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    devices = [t.device for t in flat_tensors(inputs) if t.device.type == "cuda"]
    mode = Watch(named_tensors(model).values(), hollow)
    try:
        # As in the traced run, or the operators would be others.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.random.fork_rng(devices=devices), torch.inference_mode(), mode:
            call(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return mode.seen
