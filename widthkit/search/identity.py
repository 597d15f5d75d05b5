"""Identify a search: it is resumed only from judgements of the same supernet, data and settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from widthkit.modules.structure import tensor_bytes
from widthkit.search.evaluator import Evaluator
from widthkit.search.resources import history_of
from widthkit.supernet import Supernet

_SAMPLED = 1 << 16
"""Numbers of a held-out batch that tell two data sets apart."""


def identity_of(net: Supernet, judge: Evaluator, settings: Mapping[str, Any]) -> str:
    """Hash what judgements depend on: settings, space, weights, criterion and held-out data."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode())
    digest.update(repr([(g.name, g.options) for g in net.space.groups]).encode())
    digest.update(repr(history_of(settings["searcher"], net)).encode())
    digest.update(repr((net.strategy, getattr(judge.loss, "__qualname__", type(judge.loss).__qualname__))).encode())
    for name, tensor in net.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    for batch in judge.batches:
        digest.update(f"batch of {batch.n}".encode())
        for leaf in tree_leaves((batch.inputs, batch.targets)):
            if isinstance(leaf, Tensor) and leaf.numel():
                digest.update(tensor_bytes(leaf.reshape(-1)[:: -(-leaf.numel() // _SAMPLED)]))
    return digest.hexdigest()
