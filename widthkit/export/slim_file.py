"""The two files of a slim network: weights in safetensors, record in JSON. Nothing is pickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from widthkit.errors import ModelError, SlimFileError, WidthsError, one_line
from widthkit.export.origin import Origin, origin_of
from widthkit.export.rebuild import rebuild
from widthkit.export.schema import FORMAT_VERSION, SlimRecord, checksum, encode_plan
from widthkit.files import atomic_write
from widthkit.graph.plan import apply_plan, check_shapes
from widthkit.modules.clone import all_names, meta_clone, named_tensors
from widthkit.modules.models import ModelName, likely_names
from widthkit.modules.structure import Dense, structure, structure_hash
from widthkit.version import __version__


def save_slim(slim: nn.Module, path: Path, dense: ModelName | None) -> tuple[Path, Path]:
    """Write ``PATH.safetensors`` and ``PATH.json``.

    Args:
        slim: A network that :func:`widthkit.export` made, possibly trained since.
        path: Where to write.
        dense: Name and arguments of the dense model; ``None`` if widthkit should recognise it.

    Returns:
        The two paths, weights first.

    Raises:
        SlimFileError: If the dense model's name is not known or does not rebuild this network; nothing is written.
    """
    origin = origin_of(slim)
    if origin is None:
        raise SlimFileError(f"{type(slim).__name__} was not made by widthkit.export; export it first")
    name = _name_of(slim, origin, dense)
    tensors = _state(slim)
    blob = safetensors.torch.save(tensors, metadata={"format": "pt"})
    weights, recipe = paths_of(path)
    record = {
        "format": FORMAT_VERSION,
        "widthkit": __version__,
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
        record = json.loads(json.dumps(record))  # tuples become lists, as they will be when the file is read
        text = json.dumps({**record, "sha256": checksum(record)}, indent=1)
    except TypeError as error:
        raise SlimFileError(
            f"the arguments of {name.name} are not plain JSON values ({error}); build the model by a factory "
            "of your own that takes numbers and text"
        ) from error
    atomic_write(weights, blob)
    atomic_write(recipe, text.encode())
    return weights, recipe


def load(path: str | Path, *, allow: Sequence[str] = (), device: str | torch.device = "cpu") -> nn.Module:
    """Rebuild a saved network. This needs widthkit and the model's own library; no code from the file runs.

    Args:
        path: The path that was given to :func:`save`, or either of the two files.
        allow: Factories of your own (``package.module:factory``) that the file may name. Other names must start with
            ``torchvision/`` or ``timm/``.
        device: Device of the returned network.

    Returns:
        The network in eval mode.

    Raises:
        SlimFileError: If a file is missing, damaged, of another format version, or does not fit the model.
    """
    weights, recipe = paths_of(path)
    record = _read_record(recipe)
    if ":" in record.model.name and record.model.name not in allow:
        raise SlimFileError(
            f"{recipe} names the factory '{record.model.name}'; pass allow=['{record.model.name}'] if you trust it"
        )
    blob = _read_bytes(weights)
    if hashlib.sha256(blob).hexdigest() != record.weights_sha256:
        raise SlimFileError(
            f"{weights} does not belong to {recipe} or is damaged (its checksum differs); save the network again"
        )
    slim = rebuild(record, _parse_tensors(blob, weights), weights, recipe)
    return slim.to(device).eval()


def _name_of(slim: nn.Module, origin: Origin, given: ModelName | None) -> ModelName:
    """Return the first name that rebuilds exactly this network: the given one, the origin's, or one that fits."""
    names = [given] if given else [origin.model] if origin.model else list(likely_names(slim))
    for name in names:
        try:
            twin = name.outline()
        except ModelError as error:
            if given:
                raise SlimFileError(str(error)) from error
            continue
        if _same_dense(twin, origin) and _same_result(twin, slim, origin):
            return name
    if given:
        raise SlimFileError(
            f"{given.name} with {dict(given.kwargs)} does not rebuild this network; pass the model= and kwargs= that "
            "built its dense model"
        )
    raise SlimFileError(
        f"the dense model behind this {type(slim).__name__} has no known name; pass model='package.module:factory' "
        "(and kwargs=) to say how to build it"
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
    """Return the persistent tensors; a shared tensor appears once."""
    state = slim.state_dict()
    firsts = [first for first, _ in all_names(slim).items() if first in state]
    return {name: state[name].detach().cpu().contiguous() for name in firsts}


def _parse_tensors(blob: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(blob)
    except Exception as error:
        raise SlimFileError(f"{path} is not a safetensors file: {one_line(error)}; save the network again") from error


def _read_record(path: Path) -> SlimRecord:
    return SlimRecord.parse(_read_bytes(path), path)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SlimFileError(
            f"{path} cannot be read ({error.strerror or error}); pass the path that was given to save"
        ) from error


def paths_of(path: str | Path) -> tuple[Path, Path]:
    """Return the paths of the weights and of the record, from the path that users write."""
    base = Path(path)
    if base.suffix in (".json", ".safetensors"):
        base = base.with_suffix("")
    return base.with_name(base.name + ".safetensors"), base.with_name(base.name + ".json")
