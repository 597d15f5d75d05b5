"""Tensors that the model sees while sub-networks share: their value may be there, or only its origin."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from widthkit.search.sharing.memo import Held, Origin, meta_of, recompute
from widthkit.search.sharing.tree import leaves


class Answers(Protocol):
    """A run that answers the operator calls of its stand-ins."""

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what an operator gives."""


class Aliases:
    """The living stand-ins of one run that share memory."""

    def __init__(self) -> None:
        self._members: list[weakref.ref[StandIn]] = []

    def join(self, member: StandIn) -> None:
        """Add a stand-in."""
        self._members.append(weakref.ref(member))

    def others(self, member: StandIn) -> bool:
        """Whether any other member is still in use."""
        return any(m() is not None and m() is not member for m in self._members)


class StandIn(Tensor):
    """Looks like a tensor to the model; its value may be there, or be computed when it is asked for.

    Attributes:
        run: The run that it belongs to.
        origin: Where its value comes from; ``None`` where it belongs to this sub-network alone.
        held: Its value, if it is there.
        aliases: What shares its memory.
    """

    run: Answers
    origin: Origin | None
    held: Held | None
    aliases: Aliases

    @staticmethod
    def __new__(
        cls: type[StandIn], run: Answers, origin: Origin | None, held: Held | None, aliases: Aliases
    ) -> StandIn:
        """Make a tensor without memory of its own."""
        if origin is None:
            assert held is not None
            size, stride, offset, dtype, device = meta_of(held.value)
        else:
            size, stride, offset, dtype, device = origin.meta
        made: StandIn = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, size, strides=stride, storage_offset=offset, dtype=dtype, device=device
        )
        made.run, made.origin, made.held, made.aliases = run, origin, held, aliases
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Let the run answer."""
        for argument in args:
            if type(argument) is StandIn:
                return argument.run.answer(func, args, kwargs or {})
        first = leaves((args, kwargs or {}), StandIn)[0]
        return first.run.answer(func, args, kwargs or {})

    def value(self) -> Tensor:
        """Return the value; one that was dropped is computed again."""
        if self.held is None:
            assert self.origin is not None
            self.held = recompute(self.origin)
        return self.held.value
