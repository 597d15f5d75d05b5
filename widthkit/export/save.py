"""Save a slim network in one or several formats: either all files are checked and written, or none is."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from widthkit.errors import OptionError, close_matches
from widthkit.export.check import usable_inputs
from widthkit.export.formats import FORMATS
from widthkit.export.slim_file import paths_of, save_slim
from widthkit.export.staging import StagedFiles
from widthkit.export.writer import DTYPES, CheckedWriter, Variant
from widthkit.train.modes import checked_device

Say = Callable[[str], object]


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

    ``safetensors`` writes ``PATH.safetensors`` and ``PATH.json``, which :func:`widthkit.load` reads. ``pt2`` writes
    ``PATH.pt2`` (``torch.export`` with a dynamic batch size), ``onnx`` writes ``PATH.onnx`` (dynamo exporter), ``aoti``
    writes ``PATH.aoti-cpu.pt2`` or ``PATH.aoti-cuda.pt2`` (AOTInductor). Every file is opened again and run on the
    example input at three batch sizes. The largest difference from the reference is printed and kept in ``FILE.json``.
    Nothing is written unless all files pass.

    Args:
        slim: A network that :func:`widthkit.export` made, possibly trained since. Formats other than safetensors take
            any module.
        path: Where to write; an ending ``.json`` or ``.safetensors`` is removed.
        formats: Of ``safetensors``, ``pt2``, ``onnx``, ``aoti``.
        model: Name of the dense model (``torchvision/...``, ``timm/...``, ``package.module:factory``). Models of
            torchvision and timm are recognised without it.
        kwargs: Arguments of the dense model's factory, with ``model``.
        example_inputs: As in :func:`widthkit.trace`.
        reference: The network whose outputs the files must give, for instance the supernet at these widths if ``slim``
            still has its batch-norm statistics. ``None`` is ``slim`` itself.
        dtype: ``fp32``, ``fp16``, ``bf16`` or ``fp64``; the network's own by default.
        channels_last: Keep 4-D weights and inputs with channels last in memory; ONNX has no memory formats.
        fold_bn: Fold batch norms into the convolutions before them; not for safetensors, which rebuilds the network
            with its batch norms.
        device: Where AOTInductor compiles for and the files are checked.
        say: Called with one line of text per checked file; ``None`` prints nothing.

    Returns:
        The paths of the files, weights first; the records ``FILE.json`` are not among them.

    Raises:
        SlimFileError: If the dense model's name is not known or does not rebuild this network.
        ExportError: If a format cannot hold the network, or a file computes something else; nothing is written.
        OptionError: If a format or an option is unknown, or a file cannot be written.

    >>> import tempfile, widthkit as wk
    >>> slim = wk.export(wk.create_model("torchvision/resnet18", num_classes=10), {"conv1": 16})
    >>> weights, recipe = save(slim, Path(tempfile.mkdtemp()) / "slim")
    >>> wk.load(weights).conv1.out_channels
    16
    """
    variant = Variant(dtype, channels_last, fold_bn, device)
    chosen = _check_options(formats, variant)
    with tempfile.TemporaryDirectory(prefix="widthkit-") as folder:
        staged = StagedFiles(Path(folder), paths_of(path)[0].with_suffix("").name)
        unchanged = variant == Variant() and example_inputs is None and reference is None
        if chosen == ["safetensors"] and unchanged:
            save_slim(slim, staged.base, model=model, kwargs=kwargs)
        else:
            writer = CheckedWriter(slim, variant, usable_inputs(slim, example_inputs), reference)
            for name in chosen:
                writer.write(name, staged, model, kwargs)
            if say is not None:
                for line in writer.lines:
                    say(line)
        return staged.place(paths_of(path)[0].parent)


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
