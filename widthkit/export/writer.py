"""Write one variant of a network in any format, and check that every file computes what the network computes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from widthkit.errors import ExportError, WidthkitError, one_line
from widthkit.export.check import (
    Comparison,
    compare,
    full_float32,
    outputs,
    refuse_mismatch,
    resized,
    rounding_share,
    tolerance,
)
from widthkit.export.fold import fold_batchnorm
from widthkit.export.formats import FORMATS, Prepared
from widthkit.export.slim_file import load, save_slim
from widthkit.export.staging import StagedFiles
from widthkit.modules.clone import real_clone
from widthkit.modules.models import ModelName
from widthkit.trace.inputs import Inputs, batch_size, float_dtype
from widthkit.train.modes import model_device
from widthkit.version import versions

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Say = Callable[[str], object]
RunFile = Callable[[Inputs], Any]


@dataclass(frozen=True)
class Variant:
    """The form in which a network is written.

    Args:
        dtype: ``fp32``, ``fp16``, ``bf16`` or ``fp64``; the network's own by default.
        channels_last: Keep 4-D weights and inputs with channels last in memory, which tensor cores prefer.
        fold_bn: Fold batch norms into the convolutions before them.
        device: Where AOTInductor compiles for and the files are checked (ONNX always on the CPU).
    """

    dtype: str | None = None
    channels_last: bool = False
    fold_bn: bool = False
    device: str = "cpu"


class CheckedWriter:
    """Writes one variant of a network to staged files and compares each file with the reference.

    Args:
        slim: The network; it is not changed.
        variant: The form to write.
        inputs: Example inputs; the comparison uses their batch size (at least 2), 1, and one more.
        reference: The network whose outputs the files must give; ``None`` is ``slim`` itself.
        dense: Name and arguments of the dense model, for safetensors; ``None`` if widthkit should recognise it.
    """

    def __init__(
        self,
        slim: nn.Module,
        variant: Variant,
        inputs: Inputs,
        reference: nn.Module | None,
        dense: ModelName | None,
    ) -> None:
        self.variant = variant
        self._dense = dense
        n = max(2, batch_size(inputs))
        self._inputs = {batch: resized(inputs, batch) for batch in (n, 1, n + 1)}
        self._reference = "the network itself" if reference is None else type(reference).__name__
        source = slim if reference is None else reference
        with full_float32(model_device(source)):
            self._expected = {batch: outputs(source, example) for batch, example in self._inputs.items()}
        if variant.fold_bn:
            net, self._n_folded = fold_batchnorm(slim, self._inputs[n])
        else:
            net, self._n_folded = real_clone(slim).eval(), 0
        self._dtype = DTYPES[variant.dtype] if variant.dtype else float_dtype(net)
        self._rounding = rounding_share(source, self._inputs[n], self._dtype)
        self._tolerance = tolerance(self._dtype, self._rounding)
        self._prepared = Prepared(self._cast(net.to(variant.device)), self._cast_inputs(self._inputs[n]))

    def write_all(self, names: Sequence[str], staged: StagedFiles, say: Say | None) -> None:
        """Write several formats, as :meth:`write` does, then pass each line of text to ``say``."""
        lines = [self.write(name, staged) for name in names]
        if say is not None:
            for line in lines:
                say(line)

    def write(self, name: str, staged: StagedFiles) -> str:
        """Write one format to the staging folder, run the file, compare its outputs, and keep its record.

        Returns:
            One line of text about the comparison.

        Raises:
            ExportError: If the format cannot hold the network, or the file computes something else.
        """
        try:
            file, run, more = self._write_file(name, staged)
            found = [self._compare(run, batch) for batch in self._inputs]
        except (WidthkitError, MemoryError):
            raise
        except Exception as error:  # exporters, compilers and runtimes raise classes of their own
            why = f"{type(error).__name__}: {one_line(error, 200)}"
            raise ExportError(f"format {name} failed ({why}); nothing was written") from error
        refuse_mismatch(found, f"format {name}")
        staged.record(file, self._record(name, file, found, more))
        worst = max(found, key=lambda c: c.largest_difference / (c.largest_output or 1.0))
        return (
            f"{file.name}: largest difference from {self._reference} {worst.largest_difference:.2g} "
            f"(largest output {worst.largest_output:.3g}, allowed {worst.tolerance:g} of it)"
        )

    def _write_file(self, name: str, staged: StagedFiles) -> tuple[Path, RunFile, dict[str, Any]]:
        """Return the file, a function that runs it, and the format's own entries of the record."""
        if name == "safetensors":
            file, _ = save_slim(self._prepared.net, staged.base, self._dense)
            allow = [self._dense.name] if self._dense else []
            again = self._cast(load(file, allow=allow, device=self.variant.device))
            return file, lambda inputs: outputs(again, inputs), {}
        target = FORMATS[name]
        file = staged.file(target.suffix(self._prepared.device))
        more = target.write(self._prepared, file)
        return file, target.runner(file, self._prepared.device), more

    def _compare(self, run: RunFile, batch: int) -> Comparison:
        with full_float32(self._prepared.device):
            got = run(self._cast_inputs(self._inputs[batch]))
        return compare(self._expected[batch], got, self._tolerance, batch)

    def _cast(self, net: nn.Module) -> nn.Module:
        net = net.to(self._dtype)
        return net.to(memory_format=torch.channels_last) if self.variant.channels_last else net  # type: ignore[call-overload, no-any-return]

    def _cast_inputs(self, inputs: Inputs) -> Inputs:
        def cast(t: Tensor) -> Tensor:
            t = t.to(self.variant.device, self._dtype if t.is_floating_point() else t.dtype)
            last = self.variant.channels_last and t.ndim == 4
            return t.contiguous(memory_format=torch.channels_last) if last else t

        changed: Inputs = tree_map_only(Tensor, cast, inputs)
        return changed

    def _record(self, name: str, file: Path, found: list[Comparison], more: dict[str, Any]) -> dict[str, Any]:
        tensors = [t for t in tree_leaves(self._prepared.inputs) if isinstance(t, Tensor)]
        last = self.variant.channels_last and name != "onnx"
        return {
            "format": name,
            "file": file.name,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "dtype": str(self._dtype).removeprefix("torch."),
            "memory_format": "channels_last" if last else "contiguous",
            "folded_batch_norms": self._n_folded,
            "device": str(self._prepared.device) if name != "onnx" else "cpu",
            "inputs": [["batch", *t.shape[1:]] for t in tensors],
            **more,
            "compared_with": self._reference,
            "rounding_effect": self._rounding,
            "checks": [c.record() for c in found],
            "versions": versions(),
        }
