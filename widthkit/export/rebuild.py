"""Rebuild a network from a file's record and tensors, allocating no more than the file itself holds.

The dense model is far larger than its slim descendant, and its size is whatever the file says. So it is built on the
meta device, the plan is applied there, every resulting shape is compared with the weights file, and only then do the
file's own tensors take the places of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from widthkit.errors import ModelError, SlimFileError, WidthsError
from widthkit.export.info import refresh_feature_info
from widthkit.export.origin import Origin, set_origin
from widthkit.export.schema import SlimFile, decode_plan
from widthkit.graph.plan import Plan, apply_plan, check_shapes
from widthkit.modules.clone import all_names, named_tensors
from widthkit.modules.models import ModelName
from widthkit.modules.structure import Dense, structure, structure_hash

FETCHING = frozenset(
    {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights"}
    | {"weights_backbone", "pretrained_backbone"}
)
"""Arguments that make a factory read files or the network; a slim file has no use for them."""
_SPARE = 1 << 22
"""Numbers that computed constants (index tables, grids) may take beside what the weights file justifies."""


class _TooLargeError(Exception):
    """Construction went past what the file can need."""


def rebuild(record: SlimFile, tensors: Mapping[str, Tensor], weights: Path, recipe: Path) -> nn.Module:
    """Return the network of a file.

    Args:
        record: The recipe, checked for form.
        tensors: The weights file's tensors.
        weights: For messages.
        recipe: For messages.

    Raises:
        SlimFileError: If the recipe does not fit the model or the weights.
    """
    name = ModelName(record.model.name, record.model.kwargs)
    _refuse_fetching(name, recipe)
    stored = {n: tuple(t.shape) for n, t in tensors.items()}
    most = _SPARE + 16 * sum(math.prod(shape) for shape in stored.values())
    outline = _build(name, record, recipe, most, meta_weights=False)
    described = Dense.of(outline)
    if structure_hash(described.structure) != record.dense_structure:
        raise SlimFileError(f"{recipe}: {name.name} has another structure in this version of its library")
    try:
        shapes = {n: tuple(t.shape) for n, t in named_tensors(outline).items()}
        plan = decode_plan(record, shapes, stored)
        check_shapes(outline, plan)
        _check_sizes(outline, plan, stored, most)
        slim = apply_plan(_build(name, record, recipe, most, meta_weights=True), plan, initialise=False)
    except (WidthsError, ValueError, AttributeError, TypeError, IndexError) as error:
        raise SlimFileError(f"{recipe}: the plan does not fit {name.name}: {_line(error)}") from error
    if structure_hash(structure(slim)) != record.slim_structure:
        raise SlimFileError(f"{recipe}: the plan rebuilds another network than the one that was saved")
    _fill(slim, tensors, weights)
    refresh_feature_info(slim)
    costs = record.macs, record.params, record.dense_macs, record.dense_params
    set_origin(slim, Origin(plan, described, *costs, model=name))
    return slim


def _refuse_fetching(name: ModelName, recipe: Path) -> None:
    bad = sorted(FETCHING & set(name.kwargs))
    if bad and not all(name.kwargs[b] in (None, False) for b in bad):
        raise SlimFileError(f"{recipe} passes {bad[0]}= to {name.name}; a slim file may not make a factory fetch files")


def _build(name: ModelName, record: SlimFile, recipe: Path, most: int, *, meta_weights: bool) -> nn.Module:
    try:
        with _at_most(4 * len(record.plan.shapes) + 200):
            return name.with_meta_weights(most) if meta_weights else name.outline(most)
    except (ModelError, MemoryError, RecursionError, OverflowError) as error:
        raise SlimFileError(f"{recipe}: {_line(error)}") from error


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Stop a construction that makes more parameters than a file with so many tensors can need."""
    count = 0

    def hook(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal count
        count += 1
        if count > parameters:
            raise _TooLargeError(f"the model has more than {parameters} parameters, the file describes fewer")

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _check_sizes(outline: nn.Module, plan: Plan, stored: Mapping[str, tuple[int, ...]], most: int) -> None:
    """Compare every planned shape with the weights file; what the file lacks must be small.

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
        raise ValueError(f"the model computes {computed} constants, more than a file of this size can need")


def _fill(slim: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put the file's tensors in place; the network shares no memory with anything else."""
    state = dict(tensors)
    own = slim.state_dict(keep_vars=True)
    for first, names in all_names(slim).items():
        for alias in names[1:]:
            if first in tensors:
                state[alias] = tensors[first]
    for name in sorted(set(state) & set(own)):
        if state[name].is_floating_point() != own[name].is_floating_point():
            raise SlimFileError(f"{path} does not fit its plan: '{name}' is {state[name].dtype}")
    floating = next((t.dtype for t in tensors.values() if t.is_floating_point()), None)
    if floating is not None:
        slim.to(floating)
    try:
        shared = {n: nn.Parameter(t, own[n].requires_grad) for n, t in state.items() if _is_parameter(own.get(n))}
        for names in all_names(slim).values():
            shared.update({n: shared[names[0]] for n in names[1:] if names[0] in shared})
        slim.load_state_dict({**state, **shared}, strict=True, assign=True)
    except RuntimeError as error:
        raise SlimFileError(f"{path} does not fit its plan: {_line(error)}") from error
    left = [name for name, tensor in named_tensors(slim).items() if tensor.device.type == "meta"]
    if left:
        raise SlimFileError(f"{path} lacks '{left[0]}', which this model cannot compute without its weights")


def _is_parameter(tensor: Tensor | None) -> bool:
    return isinstance(tensor, nn.Parameter)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
