"""Every way by name: how the trained network becomes a smaller one, and with what it is trained afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.recover import ours, peer
from benchmarks.recover.setup import Ledger, Setup

Slim = Callable[[Setup, Ledger, int, float, Path], nn.Module]


@dataclass(frozen=True)
class Way:
    """One way to slim.

    Args:
        slim: Returns the smaller network, before the final training.
        whose: ``widthkit`` or ``torch-pruning``.
        teacher: Whether the dense network teaches in the final training.
        changes: Settings of the final training that differ.
    """

    slim: Slim
    whose: str
    teacher: bool = False
    changes: tuple[tuple[str, Any], ...] = ()


def _peer(kind: str, stream: bool, scope: bool) -> Way:
    def slim(setup: Setup, ledger: Ledger, seed: int, macs: float, folder: Path) -> nn.Module:
        return peer.pruned(setup, ledger, seed, macs, kind=kind, stream=stream, scope=scope, folder=folder)

    return Way(slim, "torch-pruning")


def _ours(slim: Callable[..., nn.Module], **options: Any) -> Way:
    return Way(partial(slim, **options), "widthkit")


def ways() -> dict[str, Way]:
    """Return all ways."""
    found: dict[str, Way] = {}
    for kind in ("l1", "taylor", "sparse"):
        for stream in (False, True):
            for scope in (True, False):
                name = f"tp-{kind}-{'global' if scope else 'local'}{'-stream' if stream else ''}"
                found[name] = _peer(kind, stream, scope)
    found["uniform"] = _ours(ours.uniform, rank="magnitude")
    found["uniform-taylor"] = _ours(ours.uniform, rank="taylor")
    found["importance"] = _ours(ours.without_training, searcher="importance")
    found["importance-taylor"] = _ours(ours.without_training, searcher="importance", rank="taylor", criterion="taylor")
    found["greedy"] = _ours(ours.without_training, searcher="greedy")
    found["greedy-taylor"] = _ours(ours.without_training, searcher="greedy", rank="taylor")
    found["evolution"] = _ours(ours.without_training, searcher="evolution", population=16, generations=8)
    for strategy in ("ua", "bc", "bcv2", "locally-free"):
        found[strategy] = _ours(ours.with_supernet, strategy=strategy)
    found["sparse"] = _ours(
        ours.with_supernet, strategy="sparse", searcher="importance", rank=None, share=1 / 3, growth=0.1
    )
    found["iterative"] = _ours(ours.iterative, searcher="importance")
    found["iterative-greedy"] = _ours(ours.iterative, searcher="greedy")
    found["dbc"] = _ours(ours.with_supernet, strategy="dbc", share=0.4)
    for name, way in list(found.items()):
        if way.whose == "widthkit":
            found[f"{name}+teacher"] = Way(way.slim, way.whose, teacher=True)
    return found
