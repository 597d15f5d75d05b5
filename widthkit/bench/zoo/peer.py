"""torch-pruning and widthkit on the same model in the same process: halve every width, then run once."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import nn

from widthkit.bench.oracles import n_params
from widthkit.errors import OptionError
from widthkit.export.dense import export
from widthkit.trace import trace
from widthkit.trace.context import flat_tensors
from widthkit.trace.inputs import Inputs, Keywords
from widthkit.trace.recorder import call

PEERS = ("torch-pruning",)


def compare(peer: str, model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Halve a model with widthkit and with a peer; seconds from the dense model to the outputs of the halved one.

    Returns:
        ``own_seconds``, and ``seconds`` or ``error`` of the peer, with parameters left of both.
    """
    if peer not in PEERS:
        raise OptionError(f"unknown peer '{peer}'; known: {', '.join(PEERS)}")
    start = time.perf_counter()
    graph = trace(model, _example(inputs))
    slim = export(model, {n: (w + 1) // 2 for n, w in graph.full.items()}, graph=graph)
    with torch.no_grad():
        call(slim, inputs)
    row: dict[str, Any] = {"peer": peer, "own_seconds": time.perf_counter() - start, "own_params": n_params(slim)}
    del slim
    victim = copy.deepcopy(model)
    start = time.perf_counter()
    try:
        _torch_pruning(victim, inputs)
        row["params"] = n_params(victim)
        if row["params"] == n_params(model):
            row["error"] = "nothing was pruned"
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    row["seconds"] = time.perf_counter() - start
    return row


def _example(inputs: Inputs) -> Any:
    return dict(inputs[0]) if len(inputs) == 1 and isinstance(inputs[0], Keywords) else inputs


def _torch_pruning(model: nn.Module, inputs: Inputs) -> None:
    """Use it as its README does: magnitude importance, the classifier kept."""
    import torch_pruning

    with torch.no_grad():
        widths = {t.shape[1] for t in flat_tensors((call(model, inputs),)) if t.ndim > 1}
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
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
        call(model, inputs)
