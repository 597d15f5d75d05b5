"""Rebuild a network from a file's record and tensors without allocating more than the file itself holds.

The dense model is larger than the slim network, and the file decides its size. So the dense model is built on the meta
device and the plan is applied there. Every resulting shape is compared with the weights file. Only then the file's own
tensors become the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from widthkit.errors import ModelError, SlimFileError, WidthsError, one_line
from widthkit.export.feature_info import refresh_feature_info
from widthkit.export.origin import Origin, set_origin
from widthkit.export.schema import SlimRecord, decode_plan
from widthkit.graph.plan import Plan, apply_plan, check_shapes
from widthkit.modules.clone import all_names, named_tensors
from widthkit.modules.models import ModelName
from widthkit.modules.structure import Dense, structure, structure_hash

FETCHING_ARGUMENTS = frozenset(
    {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights"}
    | {"weights_backbone", "pretrained_backbone"}
)
"""Arguments that make a factory read files or download; a slim file does not need them."""
_SPARE_NUMBERS = 1 << 22
"""Numbers that a model's computed constants (index tables) may have, besides 16 per number of the weights file."""


def rebuild(record: SlimRecord, tensors: Mapping[str, Tensor], weights: Path, recipe: Path) -> nn.Module:
    """Return the network of a file.

    Args:
        record: The recipe, already validated.
        tensors: The tensors of the weights file.
        weights: Path of the weights file, for messages.
        recipe: Path of the recipe, for messages.

    Raises:
        SlimFileError: If the recipe does not fit the model or the weights.
    """
    name = ModelName(record.model.name, record.model.kwargs)
    _refuse_fetching(name, recipe)
    stored = {n: tuple(t.shape) for n, t in tensors.items()}
    most = _SPARE_NUMBERS + 16 * sum(math.prod(shape) for shape in stored.values())
    outline = _build(name, record, recipe, most, meta_weights=False)
    described = Dense.of(outline)
    if structure_hash(described.structure) != record.dense_structure:
        raise SlimFileError(
            f"{recipe}: {name.name} has another structure in the installed version of its library; install the version "
            "with which the network was saved"
        )
    try:
        shapes = {n: tuple(t.shape) for n, t in named_tensors(outline).items()}
        plan = decode_plan(record, shapes, stored)
        check_shapes(outline, plan)
        _check_sizes(outline, plan, stored, most)
        slim = apply_plan(_build(name, record, recipe, most, meta_weights=True), plan, initialise=False)
    except (WidthsError, ValueError, AttributeError, TypeError, IndexError) as error:
        raise SlimFileError(
            f"{recipe}: the plan does not fit {name.name}: {one_line(error)}; save the network again"
        ) from error
    if structure_hash(structure(slim)) != record.slim_structure:
        raise SlimFileError(
            f"{recipe}: the plan rebuilds another network than the one that was saved; save the network again"
        )
    _assign_tensors(slim, tensors, weights)
    refresh_feature_info(slim)
    costs = record.macs, record.params, record.dense_macs, record.dense_params
    set_origin(slim, Origin(plan, described, *costs, model=name))
    return slim


def _refuse_fetching(name: ModelName, recipe: Path) -> None:
    bad = sorted(FETCHING_ARGUMENTS & set(name.kwargs))
    if bad and not all(name.kwargs[b] in (None, False) for b in bad):
        raise SlimFileError(
            f"{recipe} passes {bad[0]}= to {name.name}; a slim file may not make a factory fetch files; save the "
            "network again without this argument"
        )


def _build(name: ModelName, record: SlimRecord, recipe: Path, most: int, *, meta_weights: bool) -> nn.Module:
    try:
        with _parameter_limit(4 * len(record.plan.shapes) + 200):
            return name.with_meta_weights(most) if meta_weights else name.outline(most)
    except (ModelError, MemoryError, RecursionError, OverflowError) as error:
        raise SlimFileError(f"{recipe}: {one_line(error)}") from error


@contextmanager
def _parameter_limit(most: int) -> Iterator[None]:
    """Stop the construction of a model that registers more than ``most`` parameter tensors.

    Raises:
        ModelError: If it does.
    """
    count = 0

    def hook(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ModelError(f"the model has more than {most} tensors as parameters, the file describes fewer")

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _check_sizes(outline: nn.Module, plan: Plan, stored: Mapping[str, tuple[int, ...]], most: int) -> None:
    """Compare every planned shape with the weights file; the tensors that the file lacks must be small in all.

    Raises:
        ValueError: Naming the first tensor that differs.
    """
    persistent = set(outline.state_dict())
    parameters = {name for name, _ in outline.named_parameters()}
    computed = 0
    for name, tensor in named_tensors(outline).items():
        dims = plan.tensors.get(name, {})
        shape = tuple(len(dims[d]) if d in dims else size for d, size in enumerate(tensor.shape))
        if name in persistent and stored.get(name) != shape:
            held = stored.get(name, "nothing")
            raise ValueError(f"'{name}' would have shape {shape}, the weights file holds {held}")
        if name not in parameters:
            computed += math.prod(tensor.shape)
    if computed > most:
        raise ValueError(f"the model computes constants of {computed} numbers, more than a file of this size can need")


def _assign_tensors(slim: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Make the file's tensors the weights of the network; the network then shares no memory with anything else."""
    state = dict(tensors)
    own = slim.state_dict(keep_vars=True)
    for first, names in all_names(slim).items():
        for alias in names[1:]:
            if first in tensors:
                state[alias] = tensors[first]
    for name in sorted(set(state) & set(own)):
        if state[name].is_floating_point() != own[name].is_floating_point():
            raise SlimFileError(
                f"{path} does not fit its plan: '{name}' is {state[name].dtype}, the network has {own[name].dtype}; "
                "save the network again"
            )
    floating = next((t.dtype for t in tensors.values() if t.is_floating_point()), None)
    if floating is not None:
        slim.to(floating)
    try:
        shared = {n: nn.Parameter(t, own[n].requires_grad) for n, t in state.items() if _is_parameter(own.get(n))}
        for names in all_names(slim).values():
            shared.update({n: shared[names[0]] for n in names[1:] if names[0] in shared})
        slim.load_state_dict({**state, **shared}, strict=True, assign=True)
    except RuntimeError as error:
        raise SlimFileError(f"{path} does not fit its plan: {one_line(error)}; save the network again") from error
    left = [name for name, tensor in named_tensors(slim).items() if tensor.device.type == "meta"]
    if left:
        raise SlimFileError(
            f"{path} lacks '{left[0]}', which this model cannot compute without its weights; save the network again"
        )


def _is_parameter(tensor: Tensor | None) -> bool:
    return isinstance(tensor, nn.Parameter)
