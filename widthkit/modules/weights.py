"""Load trained weights from a file into a model: all of them, or none."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from widthkit.errors import ModelError, Option, one_line
from widthkit.modules.clone import all_names
from widthkit.modules.structure import classifiers

_PLACES = ("state_dict", "model", "model_ema", "net")
_PREFIXES = ("module.", "model.", "_orig_mod.")
_COUNTERS = ("num_batches_tracked", "n_averaged")
"""Counters of batch norms and of averaged models: no forward pass reads them."""
_SHOWN = 5


@dataclass(frozen=True)
class LoadedWeights:
    """What :func:`load_weights` did.

    Args:
        file: The file.
        place: The keys under which the tensors were found, joined with dots; empty where the file holds only tensors.
        loaded: Names of the model's tensors that have the file's values now.
        reset: Names of the head's tensors that keep the model's own, fresh values.
    """

    file: Path
    place: str
    loaded: tuple[str, ...]
    reset: tuple[str, ...]

    def __str__(self) -> str:
        where = f" under '{self.place}'" if self.place else ""
        fresh = f"; fresh: {_listed(self.reset)}" if self.reset else ""
        return f"{len(self.loaded)} tensors of {self.file}{where}{fresh}"


def load_weights(model: nn.Module, file: str | Path, *, reset_head: bool = False) -> LoadedWeights:
    """Load trained weights into a model, in place.

    The file is safetensors, or a PyTorch file that ``torch.load`` reads with ``weights_only=True``: nothing in it runs
    as code. Its tensors may lie under ``state_dict``, ``model``, ``model_ema`` or ``net``, also nested; of several
    sets the first one that fits is taken. The prefixes ``module.``, ``model.`` and ``_orig_mod.`` are removed where
    that makes a name fit. Values are converted to the model's own types: half-precision files fit float32 models.

    The head is what timm's configuration of the model names as its classifier, else the last ``nn.Linear`` or
    ``nn.Conv2d`` in the order of the modules. With ``reset_head``, a head of which a tensor differs in shape or is
    missing keeps all its fresh values; every other difference is refused still.

    Args:
        model: Any module; it stays as it is if the file is refused.
        file: The file.
        reset_head: Allow a head of another size.

    Returns:
        What was loaded, and what keeps its fresh values.

    Raises:
        ModelError: If the file cannot be read without running code, or does not fit: one message lists what is missing,
            unexpected, of another shape or not finite.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "linear.pt"
    >>> torch.save({"model": {"module.weight": torch.eye(2), "module.bias": torch.zeros(2)}}, file)
    >>> model = nn.Linear(2, 2)
    >>> load_weights(model, file).place, model.weight.diagonal().tolist()
    ('model', [1.0, 1.0])
    """
    path = Path(file).expanduser()
    sets = list(_tensor_sets(_read(path)))
    if not sets:
        raise ModelError(f"{path} holds no tensors by name; save the model's state_dict()")
    comparisons = [_compare(model, place, tensors, reset_head) for place, tensors in sets]
    chosen = next((c for c in comparisons if not c.differences), None)
    if chosen is None:
        raise _refusal(model, path, min(comparisons, key=lambda c: len(c.differences)))
    model.load_state_dict(chosen.fitting, strict=False)
    return LoadedWeights(path, chosen.place, tuple(chosen.fitting), chosen.reset)


@dataclass(frozen=True)
class _Comparison:
    """A set of tensors beside a model's: each list holds texts that start with a tensor's name."""

    place: str
    fitting: Mapping[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    other_shapes: list[str]
    not_finite: list[str]
    reset: tuple[str, ...]

    @property
    def differences(self) -> list[str]:
        return [*self.missing, *self.unexpected, *self.other_shapes, *self.not_finite]


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as stream:
            start = stream.read(9)
    except OSError as error:
        raise ModelError(f"weights {path} cannot be read: {error.strerror or error}") from error
    try:
        if start[8:] == b"{":  # safetensors: the length of the header in 8 bytes, then the header, which is JSON
            return safetensors.torch.load_file(path)
        # Training scripts store their arguments in a Namespace, which is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needed = re.search(r"GLOBAL ([\w.]+)", str(error))
        if needed is None:
            raise _damaged(path, error) from error
        raise ModelError(
            f"weights {path} need code to be read ({needed[1]}), which could do anything; store "
            "the model's state_dict() alone"
        ) from error
    except Exception as error:  # both readers raise whatever a damaged file leads to
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ModelError:
    return ModelError(f"weights {path} are damaged, or neither safetensors nor a PyTorch file: {one_line(error)}")


def _tensor_sets(content: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every set of named tensors, with the keys under which it lies."""
    if not isinstance(content, Mapping):
        return
    tensors = {name: item for name, item in content.items() if isinstance(name, str) and isinstance(item, Tensor)}
    if tensors:
        yield ".".join(place), tensors
    for key in _PLACES:
        if key in content:
            yield from _tensor_sets(content[key], (*place, key))


def _compare(model: nn.Module, place: str, tensors: Mapping[str, Tensor], reset_head: bool) -> _Comparison:
    own = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    given = _renamed(tensors, own)
    shared = {name: names for names in all_names(model).values() for name in names}
    missing = [n for n in own if not _is_counter(n) and not any(other in given for other in shared.get(n, [n]))]
    unexpected = [n for n in given if n not in own and not _is_counter(n)]
    other_shapes = [n for n in given if n in own and given[n].shape != own[n].shape]
    heads = classifiers(model) if reset_head else ()
    changed = [head for head in heads if any(_within(n, head) for n in (*missing, *unexpected, *other_shapes))]
    reset = [n for n in own if any(_within(n, head) for head in changed)]

    def outside(names: list[str]) -> list[str]:
        return [n for n in names if not any(_within(n, head) for head in changed)]

    fitting = {n: t for n, t in given.items() if n in own and n not in reset}
    return _Comparison(
        place,
        fitting,
        outside(missing),
        outside(unexpected),
        [f"{n} {tuple(given[n].shape)}, not {tuple(own[n].shape)}" for n in outside(other_shapes)],
        [n for n, t in fitting.items() if not bool(torch.isfinite(t).all())],
        tuple(reset),
    )


def _renamed(tensors: Mapping[str, Tensor], own: Mapping[str, Any]) -> dict[str, Tensor]:
    """Remove prefixes from the names that the model does not have; a name that is taken keeps its prefixes."""
    renamed = {name: tensor for name, tensor in tensors.items() if name in own}
    for name, tensor in tensors.items():
        if name not in own:
            short = _without_prefixes(name, own)
            renamed[name if short in renamed else short] = tensor
    return renamed


def _without_prefixes(name: str, own: Mapping[str, Any]) -> str:
    while name not in own:
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            break
        name = name.removeprefix(prefix)
    return name


def _refusal(model: nn.Module, path: Path, found: _Comparison) -> ModelError:
    lists = {
        "missing": found.missing,
        "unexpected": found.unexpected,
        "of another shape": found.other_shapes,
        "not finite": found.not_finite,
    }
    said = "; ".join(f"{len(names)} {what}: {_listed(names)}" for what, names in lists.items() if names)
    where = f" (tensors under '{found.place}')" if found.place else ""
    text = f"weights {path}{where} do not fit {type(model).__name__}: {said}"
    heads = classifiers(model)
    names = [text.split(" ")[0] for text in found.differences]
    if not found.not_finite and all(any(_within(n, head) for head in heads) for n in names):
        return ModelError(text, "; only the head differs: ", Option("reset_head"), " keeps its fresh weights")
    return ModelError(text)


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] in _COUNTERS


def _within(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def _listed(names: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
