"""Nested Python values with tensors in one safetensors file: no pickle, nothing that could run when loaded.

Tensors become entries of the file; everything else becomes JSON in the file's metadata, marked so that tuples, integer
keys and non-finite numbers come back as they were. A checksum covers both.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from widthkit.errors import CheckpointError
from widthkit.files import replace_with

FORMAT = "widthkit-tree"
VERSION = "1"


def save_tree(path: str | Path, tree: Any) -> None:
    """Write a nested value to one file, all of it or nothing.

    Args:
        path: The file; its folder is made if need be.
        tree: Dicts (keys: str, int, float, bool, None or tuples of these), lists, tuples, str, int, float, bool,
            None and dense tensors, nested as you like. Tensors may lie on any device, share memory, be scalars or
            be non-contiguous. A tensor that occurs twice is stored once.

    Raises:
        CheckpointError: If something in the tree has another type, or the file cannot be written.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> save_tree(file, {0: torch.arange(3), "betas": (0.9, float("inf"))})
    >>> load_tree(file)
    {0: tensor([0, 1, 2]), 'betas': (0.9, inf)}
    """
    packer = _Packer()
    text = json.dumps(packer.pack(tree, "tree"), separators=(",", ":"), allow_nan=False)
    metadata = {"format": FORMAT, "version": VERSION, "tree": text, "crc32": _checksum(text, packer.tensors)}
    try:
        replace_with(Path(path), lambda temporary: save_file(packer.tensors, temporary, metadata))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write checkpoint {path}: {_reason(error)}. Free space or choose another path."
        ) from error


def load_tree(path: str | Path) -> Any:
    """Read what :func:`save_tree` wrote; all tensors come back on the CPU, with memory of their own.

    Args:
        path: The file.

    Returns:
        The tree, with the types it had (mappings come back as dicts, named tuples as tuples).

    Raises:
        CheckpointError: If the file is missing, damaged, of another kind, or of another format version.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"no checkpoint at {path}; check the path.")
    try:
        with safe_open(str(file), framework="pt", device="cpu") as content:
            metadata = content.metadata() or {}
            _check_format(path, metadata)
            # Copies, so that nothing refers to the mapped file once it is closed.
            tensors = {name: content.get_tensor(name).clone() for name in content.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged ({_reason(error)}); delete it or use a copy.") from error
    return _decoded(path, metadata, tensors)


class _Packer:
    """Turns a tree into JSON values, collecting its tensors on the way."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[object, ...], str] = {}
        # Keeps the sources alive: memory that is freed meanwhile could be reused and look like a shared tensor.
        self._sources: list[Tensor] = []

    def pack(self, value: Any, where: str) -> Any:
        """Encode one value; ``where`` is its place in the tree, for the tensor's name and for messages."""
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"f": repr(float(value))}
        if isinstance(value, Tensor):
            return {"x": self._add(value, where)}
        if isinstance(value, Mapping):
            return {"d": [[self.pack(k, f"{where}/key"), self.pack(v, f"{where}/{k}")] for k, v in value.items()]}
        if isinstance(value, (list, tuple)):
            items = [self.pack(item, f"{where}/{index}") for index, item in enumerate(value)]
            return {"t" if isinstance(value, tuple) else "l": items}
        raise CheckpointError(
            f"{where}: a checkpoint cannot hold a {type(value).__name__}; turn it into numbers, text or tensors."
        )

    def _add(self, tensor: Tensor, where: str) -> str:
        key = _memory(tensor, where)
        if key not in self._names:
            name = where if where not in self.tensors else f"{where}#{len(self.tensors)}"
            # A clone is cheap beside the disk, and leaves no shared or over-long storage behind.
            self.tensors[name] = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
            self._names[key] = name
            self._sources.append(tensor)
        return self._names[key]


def _memory(tensor: Tensor, where: str) -> tuple[object, ...]:
    """Identify the memory a tensor shows; equal for two tensors exactly if they are the same view."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise CheckpointError(f"{where}: a checkpoint holds dense tensors only; convert it with .to_dense() first.")
    if tensor.numel() == 0:
        return ("empty", tuple(tensor.shape), tensor.dtype, id(tensor))
    return (str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _check_format(path: str | Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a widthkit checkpoint; name a checkpoint.safetensors of a training run.")
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format version {metadata.get('version')}, this widthkit reads {VERSION}; "
            f"use the widthkit that wrote it."
        )


def _decoded(path: str | Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Any:
    text = metadata.get("tree", "")
    if _checksum(text, tensors) != metadata.get("crc32"):
        raise CheckpointError(f"checkpoint {path} is damaged (wrong checksum); delete it or use a copy.")
    try:
        return _unpack(json.loads(text), tensors)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged ({_reason(error)}); delete it or use a copy.") from error


def _unpack(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((tag, content),) = node.items()
    readers: dict[str, Callable[[], Any]] = {
        "x": lambda: tensors[content],
        "f": lambda: float(content),
        "l": lambda: [_unpack(item, tensors) for item in content],
        "t": lambda: tuple(_unpack(item, tensors) for item in content),
        "d": lambda: {_unpack(key, tensors): _unpack(value, tensors) for key, value in content},
    }
    return readers[tag]()


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        if tensors[name].numel():
            value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _reason(error: Exception) -> str:
    system = error.strerror if isinstance(error, OSError) else None
    return (system or " ".join(str(error).split()) or type(error).__name__).rstrip(".")
