"""How far a run is within an epoch, and how a resumed run gets there again."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from widthkit.errors import DataError
from widthkit.train import parallel
from widthkit.train.result import Totals
from widthkit.train.rng import random_states, set_random_states


@dataclass
class Place:
    """A place in an epoch; the loader is read again up to there when a run is resumed.

    Attributes:
        totals: This process's sums over the batches so far.
        lr: The learning rate at the start of the epoch.
        batches: This process's batches so far.
        seconds: Time that the epoch took before the run was stopped.
        generators: States of the random generators after the last batch, where a run is resumed.
        started: When this process began with the epoch.
    """

    totals: Totals
    lr: float
    batches: int = 0
    seconds: float = 0.0
    generators: Mapping[str, Any] | None = None
    started: float = 0.0

    def begin(self) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds that the epoch has taken so far."""
        return self.seconds + time.perf_counter() - self.started

    def rest(self, loader: Iterable[Any], device: torch.device) -> Iterator[Any]:
        """Return the epoch's batches that are still to come; those before are read and dropped.

        Args:
            loader: In the order of this epoch.
            device: Where the network computes.

        Raises:
            DataError: If the loader gives fewer batches than the run has seen already.
        """
        batches = iter(loader)
        dropped = sum(1 for _ in islice(batches, self.batches))
        if dropped < self.batches:
            raise DataError(
                f"the run has seen {self.batches} batches of this epoch and the loader gives {dropped}; pass the "
                "loader that it began with."
            )
        if self.generators is not None:
            set_random_states(self.generators, device)
        return batches

    def state_dict(self, buffers: Mapping[str, Tensor], length: int | None) -> dict[str, Any]:
        """Return this place as plain values and tensors; every process must call this, after a whole update.

        Args:
            buffers: What differs between the processes within an epoch, by name.
            length: Batches per epoch and process, or ``None`` if not known.
        """
        own = {
            "totals": self.totals.state_dict(),
            "generators": random_states(self.totals.device),
            "buffers": {name: buffer.detach().cpu() for name, buffer in buffers.items()},
        }
        return {
            "lr": self.lr,
            "batches": self.batches,
            "share": self.batches / length if length else None,
            "seconds": self.elapsed,
            "each": parallel.gather_objects(own),
        }


def place_of(
    state: Mapping[str, Any], buffers: Mapping[str, Tensor], length: int | None, device: torch.device
) -> Place:
    """Make the place that :meth:`Place.state_dict` described, and fill the buffers.

    With as many processes as before, everything is as it was. With another number the share of the epoch that is done
    is the same, buffers are the means over the processes, and the random generators go on as at the start of an epoch.

    Args:
        state: What was stored.
        buffers: Those of this process, to be overwritten.
        length: Batches per epoch and process now, or ``None`` if not known.
        device: Where the network computes.
    """
    each, now = state["each"], parallel.processes()
    same = len(each) == now
    place = Place(Totals(device), state["lr"], state["batches"], state["seconds"])
    mine = parallel.process_index()
    if same:
        place.generators = each[mine]["generators"]
    elif state["share"] is not None and length:
        place.batches = round(state["share"] * length)
    else:
        place.batches = round(state["batches"] * len(each) / now)
    # The sums of all processes are what counts, so any one may hold those of the others.
    for own in [each[mine]] if same else each if mine == 0 else []:
        place.totals.add_state(own["totals"])
    with torch.no_grad():
        for name, buffer in buffers.items():
            stored = [own["buffers"][name] for own in each]
            buffer.copy_(stored[mine] if same else _mean(stored))
    return place


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).mean(0) if tensors[0].is_floating_point() else tensors[0]
