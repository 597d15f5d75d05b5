"""Compare torch-pruning with widthkit on one model in one process: halve every width, then run once."""

from __future__ import annotations

import contextlib
import copy
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.oracles import n_params
from widthkit.errors import OptionError
from widthkit.export.dense import export
from widthkit.graph import ChannelGraph
from widthkit.trace.context import flat_tensors
from widthkit.trace.inputs import Inputs
from widthkit.trace.recorder import call_model

PEERS = ("torch-pruning",)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)
PEER_SECONDS = 60
"""A peer that needs more processor time is stopped."""


def halved(model: nn.Module, inputs: Inputs, graph: ChannelGraph, trace_seconds: float) -> dict[str, Any]:
    """Halve a model with widthkit and run it.

    Args:
        model: Stays as it is.
        inputs: What the halved model is run on.
        graph: The model's graph.
        trace_seconds: How long the trace took.

    Returns:
        ``own_seconds``, processor time from the dense model to the outputs of the halved one; and ``own_params``.
    """
    start = time.process_time()
    slim = export(model, {n: (w + 1) // 2 for n, w in graph.full.items()}, graph=graph)
    with torch.no_grad():
        call_model(slim, inputs)
    return {"own_seconds": trace_seconds + time.process_time() - start, "own_params": n_params(slim)}


def halved_by(peer: str, model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Let a peer halve a copy of the model and run it.

    Returns:
        ``peer``, ``seconds`` of processor time, ``params`` left, and ``error`` if it failed.

    Raises:
        OptionError: If the peer is unknown.
    """
    if peer not in PEERS:
        raise OptionError(f"unknown peer '{peer}'; known: {', '.join(PEERS)}")
    row: dict[str, Any] = {"peer": peer}
    victim = copy.deepcopy(model)
    start = time.process_time()
    try:
        with _limited(PEER_SECONDS):
            _torch_pruning(victim, inputs)
        row["params"] = n_params(victim)
        if row["params"] == n_params(model):
            row["error"] = "nothing was pruned"
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    row["seconds"] = time.process_time() - start
    return row


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Raise a ``TimeoutError`` in the main thread when the body takes more processor time than this."""

    def stop(_: int, __: Any) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _torch_pruning(model: nn.Module, inputs: Inputs) -> None:
    """Use torch-pruning as its README does: magnitude importance, the classifier is kept."""
    import torch_pruning

    with torch.no_grad():
        widths = {t.shape[1] for t in flat_tensors((call_model(model, inputs),)) if t.ndim > 1}
    layers = [m for m in model.modules() if isinstance(m, _LAYERS)]
    last = [m for m in layers[-2:] if (m.out_features if isinstance(m, nn.Linear) else m.out_channels) in widths]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        inputs[0] if len(inputs) == 1 else inputs,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=last[-1:],
    )
    pruner.step()
    with torch.no_grad():
        call_model(model, inputs)
