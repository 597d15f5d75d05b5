"""Run a copy of a model once and record its memory: which call allocates a block, and when the block is freed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from widthkit.modules.clone import named_tensors
from widthkit.trace.context import flat_tensors
from widthkit.trace.fake_values import run_operator
from widthkit.trace.inputs import Inputs
from widthkit.trace.outputs import Outputs
from widthkit.trace.recorder import call_model, same_operators

Shapes = tuple[tuple[int, ...], ...]


@dataclass
class BlockLifetime:
    """One block of memory.

    Args:
        owner: Number of the call that returned or first read the block, and its place there: an output ``i`` is at
            place ``i``, an argument ``i`` at ``-1 - i``.
        n_bytes: Its size.
        first_call: The first call after which it is alive.
        end_call: The first call after which it is freed; ``None`` where it survives the run.
    """

    owner: tuple[int, int]
    n_bytes: int
    first_call: int
    end_call: int | None = None


@dataclass
class Lifetimes:
    """What one run did with memory.

    Args:
        names: Operator of every call.
        inputs: Shapes of the tensors among every call's arguments.
        outputs: Shapes of the tensors that every call returned.
        is_view: Whether a call allocated nothing and wrote nothing.
        blocks: All blocks that calls returned or read, parameters and buffers of the model left out.
    """

    names: list[str] = field(default_factory=list)
    inputs: list[Shapes] = field(default_factory=list)
    outputs: list[Shapes] = field(default_factory=list)
    is_view: list[bool] = field(default_factory=list)
    blocks: list[BlockLifetime] = field(default_factory=list)


class _LifetimeMode(TorchDispatchMode):
    """Holds weak references to storages, so that it keeps none of them alive.

    Args:
        resident: Tensors that exist before the run and are counted elsewhere.
        fake_values: As the run was traced.
    """

    def __init__(self, resident: Iterable[Tensor], fake_values: bool = False) -> None:
        super().__init__()
        self.fake_values = fake_values
        self.lifetimes = Lifetimes()
        self._resident = {t.untyped_storage()._cdata for t in resident}
        self._alive: dict[int, tuple[StorageWeakRef, BlockLifetime]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and record which blocks appeared and which are gone."""
        kwargs = kwargs or {}
        number = len(self.lifetimes.names)
        self._end_freed(number)
        given = flat_tensors((args, kwargs))
        for place, tensor in enumerate(given):
            self._add_new(tensor, (number, -1 - place), first_call=0)
        out = run_operator(func, args, kwargs, self.fake_values)
        returned = flat_tensors((out,))
        new = [self._add_new(tensor, (number, place), first_call=number) for place, tensor in enumerate(returned)]
        self.lifetimes.names.append(str(func))
        self.lifetimes.inputs.append(tuple(tuple(t.shape) for t in given))
        self.lifetimes.outputs.append(tuple(tuple(t.shape) for t in returned))
        self.lifetimes.is_view.append(not any(new) and not func._schema.is_mutable)
        return out

    def _end_freed(self, number: int) -> None:
        freed = [key for key, (reference, _) in self._alive.items() if reference.expired()]
        for key in freed:
            self._alive.pop(key)[1].end_call = number

    def _add_new(self, tensor: Tensor, owner: tuple[int, int], first_call: int) -> bool:
        """Record the tensor's storage if it is new; return whether it is."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._resident or key in self._alive:
            return False
        block = BlockLifetime(owner, storage.nbytes(), first_call)
        self.lifetimes.blocks.append(block)
        self._alive[key] = (StorageWeakRef(storage), block)
        return True


def record_lifetimes(model: nn.Module, inputs: Inputs, fake_values: bool = False) -> Lifetimes:
    """Run a copy of a model and return what its operators did with memory.

    Args:
        model: A copy in eval mode, on the device of the inputs.
        inputs: Example inputs; they stay alive, as they do for whoever calls a model.
        fake_values: As the run was traced (:mod:`widthkit.trace.fake_values`).
    """
    mode = _LifetimeMode(named_tensors(model).values(), fake_values)
    # The same operators as in the traced run, or the calls of both could not be matched.
    with same_operators(inputs), mode:
        Outputs.of(call_model(model, inputs))  # a generator runs only when it is used
    return mode.lifetimes
