"""Label the model's own tensors, and freeze some of these labels by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from widthkit.modules.clone import named_tensors
from widthkit.trace.labels import Labels
from widthkit.trace.recording import Recording

TensorLabels = dict[str, tuple["Labels | None", ...]]
"""Tensor name -> per dim its labels in the first run, or ``None`` where the dim has none."""
_READ_ALONG_0 = (nn.Embedding, nn.EmbeddingBag, _ConvTransposeNd)


def label_tensors(model: nn.Module, recording: Recording) -> TensorLabels:
    """Label every dim of every floating-point parameter and buffer of a copy of the model.

    Dims of size 1 and the kernel dims of convolutions get no labels.
    """
    found: TensorLabels = {}
    kernels = {id(m.weight) for m in model.modules() if isinstance(m, _ConvNd)}
    for name, tensor in named_tensors(model).items():
        if tensor.is_floating_point():
            n_labelled = 2 if id(tensor) in kernels else tensor.ndim
            sizes = enumerate(tensor.shape)
            dims = tuple(recording.store.new(n) if n > 1 and d < n_labelled else None for d, n in sizes)
            recording.set_dims(tensor, dims)
            found[name] = recording.dims_of(tensor)
    return found


def freeze_unused(model: nn.Module, recording: Recording, tensor_labels: TensorLabels) -> None:
    """Freeze the tensors that no operator of the run read."""
    for name, tensor in named_tensors(model).items():
        if name in tensor_labels and id(tensor) not in recording.used:
            for labels in tensor_labels[name]:
                if labels is not None:
                    recording.store.freeze(labels, "not used in the traced run")


def freeze_matching(
    model: nn.Module, recording: Recording, tensor_labels: TensorLabels, patterns: Iterable[str], reason: str
) -> list[str]:
    """Freeze the output widths of the modules that patterns name; return the patterns that match nothing."""
    unmatched = []
    for pattern in patterns:
        names = [name for name in tensor_labels if under(name.rpartition(".")[0], pattern)]
        for name in names:
            freeze_produced(model, recording, tensor_labels, name, reason)
        if not names:
            unmatched.append(pattern)
    return unmatched


def freeze_produced(
    model: nn.Module, recording: Recording, tensor_labels: TensorLabels, name: str, reason: str
) -> None:
    """Freeze the output width of the module that holds the tensor ``name``."""
    labels = tensor_labels[name]
    produced = labels[produced_dim(model, name)] if labels else None
    if produced is not None:
        recording.store.freeze(produced, reason)


def produced_dim(model: nn.Module, name: str) -> int:
    """Return the dim of a tensor that counts its module's outputs: 1 for weights that read along dim 0, else 0.

    >>> produced_dim(nn.Sequential(nn.Linear(3, 4), nn.Embedding(5, 6)), "1.weight")
    1
    """
    path, _, last = name.rpartition(".")
    return int(last == "weight" and isinstance(model.get_submodule(path), _READ_ALONG_0))


def under(module: str, pattern: str) -> bool:
    """Whether a module path matches a pattern or lies below a module that does.

    >>> under("layer4.0.conv1", "layer4"), under("layer40", "layer4"), under("layer4.1", "layer*.1")
    (True, False, True)
    """
    return fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(module, f"{pattern}.*")
