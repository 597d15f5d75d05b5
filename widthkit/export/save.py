"""Save and load slim networks without pickle: weights in safetensors, structure in JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import widthkit.version
from widthkit.clone import all_names, meta_clone, named_tensors
from widthkit.errors import ModelError, SlimFileError, WidthsError
from widthkit.export.info import refresh_feature_info
from widthkit.export.origin import Origin, origin_of, set_origin
from widthkit.export.schema import SlimFile, decode_plan, encode_plan
from widthkit.files import atomic_write
from widthkit.models import ModelName, candidates, create_model
from widthkit.plan import apply_plan, check_shapes
from widthkit.structure import Dense, structure, structure_hash


def save_files(
    slim: nn.Module, path: str | Path, *, model: str | None = None, kwargs: Mapping[str, Any] | None = None
) -> tuple[Path, Path]:
    """Write ``PATH.safetensors`` and ``PATH.json``; see :func:`widthkit.save`.

    Returns:
        The two paths, weights first.

    Raises:
        SlimFileError: If the dense model's name is not known or does not rebuild this network; nothing is written.
    """
    origin = origin_of(slim)
    if origin is None:
        raise SlimFileError(f"{type(slim).__name__} was not made by widthkit.export; export it first")
    name = _name_of(slim, origin, ModelName(model, dict(kwargs or {})) if model else None)
    tensors = _state(slim)
    blob = safetensors.torch.save(tensors, metadata={"format": "pt"})
    weights, recipe = paths_of(path)
    record = {
        "format": 1,
        "widthkit": widthkit.version.__version__,
        "model": {"name": name.name, "kwargs": dict(name.kwargs)},
        "dense_structure": structure_hash(origin.dense.structure),
        "slim_structure": structure_hash(structure(slim)),
        "weights_sha256": hashlib.sha256(blob).hexdigest(),
        "macs": origin.macs,
        "params": origin.params,
        "dense_macs": origin.dense_macs,
        "dense_params": origin.dense_params,
        "plan": encode_plan(origin.plan),
    }
    try:
        text = json.dumps(record, indent=1)
    except TypeError as error:
        raise SlimFileError(f"the arguments of {name.name} are not plain JSON values: {error}") from error
    atomic_write(weights, blob)
    atomic_write(recipe, text.encode())
    return weights, recipe


def load(path: str | Path, *, allow: Sequence[str] = (), device: str | torch.device = "cpu") -> nn.Module:
    """Rebuild a saved network; needs widthkit and the model's own library, and runs no code from the file.

    Args:
        path: What was given to :func:`save`, or either of the two files.
        allow: Factories of your own (``package.module:factory``) that a file may name; only ``torchvision/`` and
            ``timm/`` are trusted otherwise.
        device: Where to put it.

    Returns:
        The network in eval mode.

    Raises:
        SlimFileError: If a file is missing, damaged, of another format version, or does not fit the model.
    """
    weights, recipe = paths_of(path)
    record = _read(recipe)
    if ":" in record.model.name and record.model.name not in allow:
        raise SlimFileError(
            f"{recipe} names the factory '{record.model.name}'; pass allow=['{record.model.name}'] if you trust it"
        )
    blob = _bytes(weights)
    if hashlib.sha256(blob).hexdigest() != record.weights_sha256:
        raise SlimFileError(f"{weights} does not belong to {recipe} or is damaged (checksum differs); save it again")
    name = ModelName(record.model.name, record.model.kwargs)
    slim = _rebuild(name, record, recipe)
    _load_state(slim, blob, weights)
    return slim.to(device).eval()


def _rebuild(name: ModelName, record: SlimFile, recipe: Path) -> nn.Module:
    try:
        dense = create_model(name.name, **name.kwargs)
    except ModelError as error:
        raise SlimFileError(f"{recipe}: {error}") from error
    described = Dense.of(dense)
    if structure_hash(described.structure) != record.dense_structure:
        raise SlimFileError(f"{recipe}: {name.name} has another structure in this version of its library")
    try:
        plan = decode_plan(record, {n: tuple(t.shape) for n, t in named_tensors(dense).items()})
        slim = apply_plan(dense, plan)
    except (WidthsError, ValueError, AttributeError, TypeError, IndexError) as error:
        raise SlimFileError(f"{recipe}: the plan does not fit {name.name}: {' '.join(str(error).split())}") from error
    if structure_hash(structure(slim)) != record.slim_structure:
        raise SlimFileError(f"{recipe}: the plan rebuilds another network than the one that was saved")
    refresh_feature_info(slim)
    costs = record.macs, record.params, record.dense_macs, record.dense_params
    set_origin(slim, Origin(plan, described, *costs, model=name))
    return slim


def _name_of(slim: nn.Module, origin: Origin, given: ModelName | None) -> ModelName:
    """Return the first name that rebuilds exactly this network."""
    known = [given] if given else [origin.model] if origin.model else list(candidates(slim))
    for candidate in known:
        try:
            twin = candidate.outline()
        except ModelError as error:
            if given:
                raise SlimFileError(str(error)) from error
            continue
        if _same_dense(twin, origin) and _same_result(twin, slim, origin):
            return candidate
    if given:
        raise SlimFileError(f"{given.name} with {dict(given.kwargs)} does not rebuild this network")
    raise SlimFileError(
        f"the dense model behind this {type(slim).__name__} has no known name; pass model='package.module:factory' "
        "(and kwargs=) so that it can be rebuilt"
    )


def _same_dense(twin: nn.Module, origin: Origin) -> bool:
    described = Dense.of(twin)
    return (described.structure, described.attributes) == (origin.dense.structure, origin.dense.attributes)


def _same_result(dense: nn.Module, slim: nn.Module, origin: Origin) -> bool:
    try:
        check_shapes(dense, origin.plan)
    except WidthsError:
        return False
    twin = apply_plan(meta_clone(dense), origin.plan)
    shapes = {n: t.shape for n, t in named_tensors(twin).items()}
    return structure(twin) == structure(slim) and shapes == {n: t.shape for n, t in named_tensors(slim).items()}


def _state(slim: nn.Module) -> dict[str, Tensor]:
    """Return the persistent tensors, shared ones once."""
    state = slim.state_dict()
    firsts = [first for first, _ in all_names(slim).items() if first in state]
    return {name: state[name].detach().cpu().contiguous() for name in firsts}


def _load_state(slim: nn.Module, blob: bytes, path: Path) -> None:
    try:
        tensors = safetensors.torch.load(blob)
    except Exception as error:
        raise SlimFileError(f"{path} is not a safetensors file: {error}") from error
    state = dict(tensors)
    for first, names in all_names(slim).items():
        for alias in names[1:]:
            if first in tensors:
                state[alias] = tensors[first]
    stored = next((t.dtype for t in tensors.values() if t.is_floating_point()), None)
    if stored is not None:
        slim.to(stored)
    try:
        slim.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise SlimFileError(f"{path} does not fit its plan: {' '.join(str(error).split())[:200]}") from error


def _read(path: Path) -> SlimFile:
    return SlimFile.parse(_bytes(path), path)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SlimFileError(
            f"{path} cannot be read ({error.strerror or error}); pass what was given to save"
        ) from error


def paths_of(path: str | Path) -> tuple[Path, Path]:
    """Return the paths of the weights and of the recipe."""
    base = Path(path)
    if base.suffix in (".json", ".safetensors"):
        base = base.with_suffix("")
    return base.with_name(base.name + ".safetensors"), base.with_name(base.name + ".json")
