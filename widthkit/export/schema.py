"""The JSON record of a slim network, checked before anything is built from it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from widthkit.errors import SlimFileError
from widthkit.graph import IntArray
from widthkit.graph.plan import Plan

FORMAT_VERSION = 1
IndexRanges = list[tuple[int, int]]
"""Indices as ranges ``(start, length)``; a start of -1 stands for new entries."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class ModelRecord(_Strict):
    """The dense model: its name and the arguments of its factory."""

    name: str
    kwargs: dict[str, Any]


class AttributeRecord(_Strict):
    """One integer attribute of a module that changes; ``element`` is its place in a tuple, or ``None``."""

    module: str
    name: str
    element: int | None
    value: int


class PlanRecord(_Strict):
    """The plan: widths, kept indices per tensor and dim, attributes, and the dense model's shapes."""

    widths: dict[str, int]
    tensors: dict[str, dict[str, list[list[int]]]]
    attributes: list[AttributeRecord]
    shapes: dict[str, list[int]]


class SlimRecord(_Strict):
    """The whole record."""

    format: int
    widthkit: str
    model: ModelRecord
    dense_structure: str
    slim_structure: str
    weights_sha256: str
    macs: int
    params: int
    dense_macs: int
    dense_params: int
    plan: PlanRecord
    sha256: str

    @classmethod
    def parse(cls, data: bytes, path: Path) -> SlimRecord:
        """Read and check a record.

        Raises:
            SlimFileError: If it is damaged or of another format version.
        """
        try:
            raw = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise SlimFileError(f"{path} is not JSON ({error}); save the network again") from error
        version = raw.get("format") if isinstance(raw, dict) else None
        if version != FORMAT_VERSION:
            raise SlimFileError(
                f"{path} has format version {version!r}; this widthkit reads version {FORMAT_VERSION}: "
                "install the widthkit that wrote the file, or save the network again"
            )
        if raw.get("sha256") != checksum(raw):
            raise SlimFileError(f"{path} is damaged (its checksum differs); save the network again")
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise SlimFileError(f"{path} is damaged at '{where}': {first['msg']}; save the network again") from error


def checksum(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a record without its own checksum.

    It finds accidents, not forgeries. The other checks bound what a forged record can do.
    """
    rest = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def encode_plan(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON values."""
    return {
        "widths": dict(plan.widths),
        "tensors": {n: {str(d): to_ranges(i) for d, i in dims.items()} for n, dims in plan.tensors.items()},
        "attributes": [
            {"module": module, "name": name, "element": element, "value": value}
            for (module, name), values in plan.attributes.items()
            for element, value in values.items()
        ],
        "shapes": {name: list(plan.shapes[name]) for name in plan.shapes},
    }


def decode_plan(
    record: SlimRecord, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]
) -> Plan:
    """Return the plan of a record.

    Args:
        record: The validated record.
        shapes: Tensor name -> shape in the dense model.
        stored: Tensor name -> shape in the weights file; no other tensor may be larger than its largest.

    Raises:
        ValueError: If a name, dim or index does not exist, or a size differs from the weights file; raised before
            anything of that size is allocated.
    """
    largest = max([math.prod(shape) for shape in stored.values()], default=0)
    tensors: dict[str, dict[int, IntArray]] = {}
    for name, dims in record.plan.tensors.items():
        if name not in shapes:
            raise ValueError(f"no tensor '{name}'")
        for text, ranges in dims.items():
            dim = int(text)
            if not 0 <= dim < len(shapes[name]):
                raise ValueError(f"'{name}' has no dim {dim}")
            where = f"{name}[{dim}]"
            _check_total(ranges, stored.get(name), dim, largest, where)
            tensors.setdefault(name, {})[dim] = from_ranges(ranges, shapes[name][dim], where)
    attributes: dict[tuple[str, str], dict[int | None, int]] = {}
    for a in record.plan.attributes:
        if not 1 <= a.value < 2**31:
            raise ValueError(f"{a.module}.{a.name} = {a.value} is no size")
        attributes.setdefault((a.module, a.name), {})[a.element] = a.value
    expected = {name: tuple(shape) for name, shape in record.plan.shapes.items()}
    return Plan(record.plan.widths, {}, tensors, attributes, expected)


def _check_total(ranges: list[list[int]], stored: tuple[int, ...] | None, dim: int, largest: int, where: str) -> None:
    total = sum(one[1] for one in ranges if len(one) == 2)
    fits = total <= largest if stored is None else dim < len(stored) and total == stored[dim]
    if not fits:
        raise ValueError(f"{where}: {total} entries, which the weights file does not hold")


def to_ranges(index: IntArray) -> IndexRanges:
    """Write indices as ranges.

    >>> to_ranges(np.array([0, 1, 2, 7, -1, -1]))
    [(0, 3), (7, 1), (-1, 2)]
    """
    ranges: IndexRanges = []
    for value in index.tolist():
        if ranges:
            start, length = ranges[-1]
            follows = value == -1 if start == -1 else value == start + length
            if follows:
                ranges[-1] = (start, length + 1)
                continue
        ranges.append((value, 1))
    return ranges


def from_ranges(ranges: list[list[int]], size: int, where: str) -> IntArray:
    """Read ranges back.

    Args:
        ranges: Pairs ``[start, length]``.
        size: Size of the dim. Indices must be ascending and below it; there may be 16 times as many entries.
        where: Tensor and dim, for the message.

    Returns:
        ``[entries]``: the indices; -1 for a new entry.

    Raises:
        ValueError: If the ranges are malformed or out of bounds.

    >>> from_ranges([[0, 3], [-1, 2]], 4, "w[0]").tolist()
    [0, 1, 2, -1, -1]
    """
    last, total = -1, 0
    for one in ranges:
        if len(one) != 2 or one[1] < 1 or one[0] < -1:
            raise ValueError(f"{where}: {one} is not a range [start, length]")
        start, length = one
        total += length
        if start >= 0:
            if start <= last or start + length > size:
                raise ValueError(f"{where}: indices {start}..{start + length - 1} do not fit a dim of size {size}")
            last = start + length - 1
    if not 0 < total <= 16 * size:
        raise ValueError(f"{where}: {total} entries from a dim of size {size}")
    return np.concatenate([np.full(n, -1) if s == -1 else np.arange(s, s + n) for s, n in ranges]).astype(np.int64)
