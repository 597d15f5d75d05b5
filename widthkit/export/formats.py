"""Write a slim network in several formats: all of them checked, or none of them there."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from widthkit.errors import ExportError, OptionError, WidthkitError, close_matches
from widthkit.export.check import (
    Comparison,
    compare,
    full_float32,
    outputs,
    refuse_mismatch,
    resized,
    rounding_share,
    tolerance,
    usable_inputs,
)
from widthkit.export.convert import FORMATS, Prepared
from widthkit.export.fold import fold_batchnorm
from widthkit.export.save import load, paths_of, save_files
from widthkit.files import atomic_json, replace_with
from widthkit.modules.clone import real_clone
from widthkit.trace.inputs import Inputs, batch_size
from widthkit.train.modes import checked_device, model_device
from widthkit.version import versions

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Say = Callable[[str], object]


@dataclass(frozen=True)
class Variant:
    """In which form a network goes into the files.

    Args:
        dtype: ``fp32``, ``fp16``, ``bf16`` or ``fp64``; the network's own by default.
        channels_last: Keep 4-D weights and inputs with channels last in memory, which tensor cores prefer.
        fold_bn: Fold batch norms into the convolutions before them.
        device: Where AOTInductor compiles for, and where the files are checked (ONNX always on the CPU).
    """

    dtype: str | None = None
    channels_last: bool = False
    fold_bn: bool = False
    device: str = "cpu"


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
    """Write a slim network: safetensors and JSON by default, and other formats by name.

    ``PATH.safetensors`` and ``PATH.json`` are what :func:`widthkit.load` reads. ``pt2`` writes ``PATH.pt2``
    (``torch.export`` with a dynamic batch), ``onnx`` writes ``PATH.onnx`` (dynamo exporter), ``aoti`` writes
    ``PATH.aoti-cpu.pt2`` or ``PATH.aoti-cuda.pt2`` (AOTInductor). Files are opened again and run on the example input
    at three batch sizes; the largest difference from the reference is printed and kept in ``FILE.json``. Nothing is
    written unless all of them pass.

    Args:
        slim: A network that :func:`widthkit.export` made, trained further or not; any other module for formats
            beside safetensors.
        path: Where to write; an ending ``.json`` or ``.safetensors`` is dropped.
        formats: Of ``safetensors``, ``pt2``, ``onnx``, ``aoti``.
        model: Name of the dense model (``torchvision/...``, ``timm/...``, ``package.module:factory``); found by
            itself for models of torchvision and timm.
        kwargs: Arguments of the dense model's factory, with ``model``.
        example_inputs: As in :func:`widthkit.trace`.
        reference: What the files must compute: the supernet at these widths, for instance, if ``slim`` still has
            its batch-norm statistics. ``None`` is ``slim`` itself.
        dtype: ``fp32``, ``fp16``, ``bf16`` or ``fp64``; the network's own by default.
        channels_last: Keep 4-D weights and inputs with channels last in memory; ONNX knows no memory formats.
        fold_bn: Fold batch norms into the convolutions before them; not for safetensors, which must rebuild the
            network as it is.
        device: Where AOTInductor compiles for and the files are checked.
        say: Called with one line per checked file; ``None`` is silent.

    Returns:
        The paths that were written, weights first; records of checks are not among them.

    Raises:
        SlimFileError: If the dense model's name is not known or does not rebuild this network.
        ExportError: If a format cannot hold the network, or a file computes something else. Nothing is written.

    >>> import tempfile, widthkit as wk
    >>> slim = wk.export(wk.create_model("torchvision/resnet18", num_classes=10), {"conv1": 16})
    >>> weights, recipe = save(slim, Path(tempfile.mkdtemp()) / "slim")
    >>> load(weights).conv1.out_channels
    16
    """
    variant = Variant(dtype, channels_last, fold_bn, device)
    chosen = _check_options(formats, variant)
    with tempfile.TemporaryDirectory(prefix="widthkit-") as folder:
        staged = _Staged(Path(folder), paths_of(path)[0].with_suffix("").name)
        plain = chosen == ["safetensors"] and variant == Variant() and example_inputs is None and reference is None
        if plain:
            save_files(slim, staged.base, model=model, kwargs=kwargs)
        else:
            job = _Job(slim, variant, usable_inputs(slim, example_inputs), reference)
            for name in chosen:
                job.produce(name, staged, model, kwargs)
            for line in job.lines if say else ():
                say(line)  # type: ignore[misc]
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

    Raises:
        OptionError: With the close matches.
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
        raise OptionError(f"no format was named; known: {', '.join(known)}")
    if variant.dtype is not None and variant.dtype not in DTYPES:
        raise OptionError(f"unknown dtype '{variant.dtype}': {close_matches(variant.dtype, DTYPES)}")
    if variant.fold_bn and "safetensors" in formats:
        raise OptionError(
            "safetensors rebuilds the network with its batch norms, so it cannot be folded; "
            "write pt2, onnx or aoti with folding, safetensors without"
        )
    checked_device(variant.device)
    return list(dict.fromkeys(formats))


class _Staged:
    """Files that wait in a temporary folder until all of them are good."""

    def __init__(self, folder: Path, name: str) -> None:
        self.base = folder / name
        self._records: dict[str, dict[str, Any]] = {}

    def file(self, suffix: str) -> Path:
        return self.base.with_name(self.base.name + suffix)

    def record(self, file: Path, record: dict[str, Any]) -> None:
        self._records[file.name] = record

    def place(self, folder: Path) -> tuple[Path, ...]:
        """Move everything to its place; a file that cannot be written takes the others back."""
        import shutil

        order = sorted(self.base.parent.iterdir(), key=lambda f: (f.suffix == ".json", f.name))
        placed: list[Path] = []
        try:
            for file in order:
                target = folder / file.name
                fresh = not target.exists()
                replace_with(target, lambda temporary, file=file: shutil.copyfile(file, temporary))  # type: ignore[misc]
                placed += [target] if fresh else []
            for name, record in self._records.items():
                target = folder / f"{name}.json"
                fresh = not target.exists()
                atomic_json(target, record)
                placed += [target] if fresh else []
        except (OSError, OptionError) as error:
            for target in placed:
                with contextlib.suppress(OSError):
                    target.unlink()
            if isinstance(error, OptionError):
                raise
            raise OptionError(f"cannot write {folder}: {error.strerror or error}; choose another path") from error
        return tuple(folder / file.name for file in order)


class _Job:
    """One network, one variant of it, and what each file must compute."""

    def __init__(self, slim: nn.Module, variant: Variant, inputs: Inputs, reference: nn.Module | None) -> None:
        self.slim, self.variant = slim, variant
        self.lines: list[str] = []
        n = max(2, batch_size(inputs))
        self.inputs = {batch: resized(inputs, batch) for batch in (n, 1, n + 1)}
        self.against = "the network itself" if reference is None else type(reference).__name__
        source = slim if reference is None else reference
        with full_float32(model_device(source)):
            self.expected = {batch: outputs(source, example) for batch, example in self.inputs.items()}
        if variant.fold_bn:
            slim, self.folded = fold_batchnorm(slim, self.inputs[n])
        else:
            slim, self.folded = real_clone(slim).eval(), 0
        self.dtype = DTYPES[variant.dtype] if variant.dtype else _dtype(slim)
        self.rounding = rounding_share(source, self.inputs[n], self.dtype)
        self.allowed = tolerance(self.dtype, self.rounding)
        self.net = self._cast(slim.to(variant.device))
        self.prepared = Prepared(self.net, self._cast_inputs(self.inputs[n]))

    def _cast(self, net: nn.Module) -> nn.Module:
        net = net.to(self.dtype)
        return net.to(memory_format=torch.channels_last) if self.variant.channels_last else net  # type: ignore[call-overload, no-any-return]

    def _cast_inputs(self, inputs: Inputs) -> Inputs:
        def change(t: Tensor) -> Tensor:
            t = t.to(self.variant.device, self.dtype if t.is_floating_point() else t.dtype)
            last = self.variant.channels_last and t.ndim == 4
            return t.contiguous(memory_format=torch.channels_last) if last else t

        changed: Inputs = tree_map_only(Tensor, change, inputs)
        return changed

    def produce(self, name: str, staged: _Staged, model: str | None, kwargs: Mapping[str, Any] | None) -> None:
        """Write one format into the staging folder, open it, compare, and note the record."""
        try:
            file, run, more = self._written(name, staged, model, kwargs)
            found = [self._compare(run, batch) for batch in self.inputs]
        except (WidthkitError, KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ExportError(f"format {name} failed ({why}); nothing was written") from error
        refuse_mismatch(found, f"format {name}")
        staged.record(file, self._record(name, file, found, more))
        worst = max(found, key=lambda c: c.largest_difference / (c.largest_output or 1.0))
        self.lines.append(
            f"{file.name}: largest difference from {self.against} {worst.largest_difference:.2g} "
            f"(largest output {worst.largest_output:.3g}, allowed {worst.tolerance:g} of it)"
        )

    def _written(
        self, name: str, staged: _Staged, model: str | None, kwargs: Mapping[str, Any] | None
    ) -> tuple[Path, Any, dict[str, Any]]:
        if name == "safetensors":
            file, _ = save_files(self.net, staged.base, model=model, kwargs=kwargs)
            again = self._cast(load(file, allow=[model] if model else [], device=self.variant.device))
            return file, lambda inputs: outputs(again, inputs), {}
        target = FORMATS[name]
        file = staged.file(target.suffix(self.prepared.device))
        more = target.write(self.prepared, file)
        return file, target.runner(file, self.prepared.device), more

    def _compare(self, run: Any, batch: int) -> Comparison:
        with full_float32(self.prepared.device):
            got = run(self._cast_inputs(self.inputs[batch]))
        return compare(self.expected[batch], got, self.allowed, batch)

    def _record(self, name: str, file: Path, found: list[Comparison], more: dict[str, Any]) -> dict[str, Any]:
        tensors = [t for t in torch.utils._pytree.tree_leaves(self.prepared.inputs) if isinstance(t, Tensor)]
        last = self.variant.channels_last and name != "onnx"
        return {
            "format": name,
            "file": file.name,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "memory_format": "channels_last" if last else "contiguous",
            "folded_batch_norms": self.folded,
            "device": str(self.prepared.device) if name != "onnx" else "cpu",
            "inputs": [["batch", *t.shape[1:]] for t in tensors],
            **more,
            "compared_with": self.against,
            "rounding_weights_and_inputs_does": self.rounding,
            "checks": [c.record() for c in found],
            "versions": versions(),
        }


def _dtype(net: nn.Module) -> torch.dtype:
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
