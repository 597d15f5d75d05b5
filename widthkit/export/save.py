"""Save a slim network in one or several formats: either all files are checked and written, or none is."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from widthkit.errors import OptionError, close_matches
from widthkit.export.check import usable_inputs
from widthkit.export.formats import FORMATS
from widthkit.export.slim_file import paths_of, save_slim
from widthkit.export.staging import StagedFiles
from widthkit.export.writer import DTYPES, CheckedWriter, Say, Variant
from widthkit.modules.models import ModelName
from widthkit.train.modes import checked_device


def save(
    slim: nn.Module,
    path: str | Path,
    *,
    formats: Sequence[str] = ("safetensors",),
    model: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    example_inputs: Any = None,
    reference: nn.Module | None = None,
    dtype: str | None = None,
    channels_last: bool = False,
    fold_bn: bool = False,
    device: str = "cpu",
    say: Say | None = print,
) -> tuple[Path, ...]:
    """Write a slim network: safetensors and JSON by default, other formats by name.

    ``safetensors`` writes ``PATH.safetensors`` and ``PATH.json``, which :func:`widthkit.load` reads. Every file is
    opened again and run at three batch sizes; ``FILE.json`` keeps the largest difference from the reference. Nothing is
    written unless all files pass.

    Args:
        slim: A network that :func:`widthkit.export` made; formats other than safetensors take any module.
        path: Where to write; an ending ``.json`` or ``.safetensors`` is removed.
        formats: Of ``safetensors``, ``pt2`` (``torch.export``), ``onnx``, ``aoti`` (AOTInductor).
        model: Name of the dense model; models of torchvision and timm are recognised without it.
        kwargs: Arguments of the dense model's factory, with ``model``.
        example_inputs: As in :func:`widthkit.trace`.
        reference: The network whose outputs the files must give; by default ``slim`` itself.
        dtype: ``fp32``, ``fp16``, ``bf16`` or ``fp64``; the network's own by default.
        channels_last: Keep 4-D weights and inputs with channels last in memory; ONNX has no memory formats.
        fold_bn: Fold batch norms into the convolutions before them; not for safetensors.
        device: Where AOTInductor compiles for and the files are checked.
        say: Called with one line of text per checked file; ``None`` prints nothing.

    Returns:
        The paths of the files, weights first; the records ``FILE.json`` are not among them.

    Raises:
        SlimFileError: If the dense model's name is not known or does not rebuild this network; nothing is written.
        ExportError: If a format cannot hold the network, or a file computes something else; nothing is written.

    >>> import tempfile, widthkit as wk
    >>> slim = wk.export(wk.create_model("torchvision/resnet18", num_classes=10), {"conv1": 16})
    >>> weights, recipe = save(slim, Path(tempfile.mkdtemp()) / "slim")
    >>> wk.load(weights).conv1.out_channels
    16
    """
    variant = Variant(dtype, channels_last, fold_bn, device)
    chosen = _check_options(formats, variant)
    dense = ModelName(model, dict(kwargs or {})) if model else None
    target = paths_of(path)[0]
    with tempfile.TemporaryDirectory(prefix="widthkit-") as folder:
        staged = StagedFiles(Path(folder), target.with_suffix("").name)
        if chosen == ["safetensors"] and variant == Variant() and example_inputs is None and reference is None:
            save_slim(slim, staged.base, dense)
        else:
            inputs = usable_inputs(slim, example_inputs)
            CheckedWriter(slim, variant, inputs, reference, dense).write_all(chosen, staged, say)
        return staged.place(target.parent)


def check_formats(
    formats: Sequence[str],
    *,
    dtype: str | None = None,
    channels_last: bool = False,
    fold_bn: bool = False,
    device: str = "cpu",
) -> None:
    """Refuse formats and variants that do not exist, before anything is loaded.

    Args:
        formats: As in :func:`save`; so are the others.
        dtype: Number type.
        channels_last: Memory format.
        fold_bn: Fold batch norms.
        device: Device.

    Raises:
        OptionError: With the names that are close, or with the remedy.
    """
    _check_options(formats, Variant(dtype, channels_last, fold_bn, device))


def _check_options(formats: Sequence[str], variant: Variant) -> list[str]:
    known = ["safetensors", *FORMATS]
    if isinstance(formats, str):
        raise OptionError(f"formats= takes a list; write formats=['{formats}']")
    for name in formats:
        if name not in known:
            raise OptionError(f"unknown format '{name}': {close_matches(name, known)}")
    if not formats:
        raise OptionError(f"no format was named; choose from {', '.join(known)}")
    if variant.dtype is not None and variant.dtype not in DTYPES:
        raise OptionError(f"unknown dtype '{variant.dtype}': {close_matches(variant.dtype, DTYPES)}")
    if variant.fold_bn and "safetensors" in formats:
        raise OptionError(
            "safetensors rebuilds the network with its batch norms, so it cannot be folded; "
            "save pt2, onnx or aoti with folding, and safetensors without"
        )
    checked_device(variant.device)
    return list(dict.fromkeys(formats))
