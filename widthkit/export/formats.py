"""The file formats besides safetensors: ``torch.export``, ONNX, AOTInductor. Each writes a file and runs it again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from widthkit.errors import ExportError, one_line
from widthkit.export.check import call_arguments
from widthkit.trace.inputs import Inputs, batch_size
from widthkit.train.modes import model_device

OPSET = 18
"""The ONNX operator set that the dynamo exporter writes natively."""


@dataclass
class Prepared:
    """A network as it is written: in eval mode, on its device, in its dtype and memory format.

    Args:
        net: The network.
        inputs: Example inputs of the same device, dtype and memory format; at least two examples.
    """

    net: nn.Module
    inputs: Inputs

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return model_device(self.net)

    @cached_property
    def program(self) -> ExportedProgram:
        """The network as a ``torch.export`` program with a dynamic batch size; made once for all formats.

        Raises:
            ExportError: If it cannot be read.
        """
        args, kwargs = call_arguments(self.inputs)
        n, batch = batch_size(self.inputs), Dim("batch", min=1)

        def spec(value: Any) -> Any:
            return {0: batch} if isinstance(value, Tensor) and value.ndim and value.shape[0] == n else None

        shapes = tree_map(spec, kwargs if kwargs else args)
        try:
            with torch.no_grad():
                return torch.export.export(self.net, args, kwargs, dynamic_shapes=shapes)
        except Exception as error:
            raise ExportError(
                f"torch.export cannot read {type(self.net).__name__} with a dynamic batch ({type(error).__name__}: "
                f"{one_line(error)}); save it as safetensors, or make its forward pass free of Python control flow "
                "on values"
            ) from error


class Format(ABC):
    """One file format.

    Attributes:
        name: The name that users write.
    """

    name: str

    @abstractmethod
    def suffix(self, device: torch.device) -> str:
        """Return the file's ending."""

    @abstractmethod
    def write(self, prepared: Prepared, path: Path) -> dict[str, Any]:
        """Write the file; return the entries that its record has besides the common ones."""

    @abstractmethod
    def runner(self, path: Path, device: torch.device) -> Any:
        """Open the file; return a function from inputs to outputs."""


class TorchExport(Format):
    """``torch.export``: a graph of ATen operators; ``torch.export.load`` reads it."""

    name = "pt2"

    def suffix(self, device: torch.device) -> str:
        """Return the file's ending."""
        return ".pt2"

    def write(self, prepared: Prepared, path: Path) -> dict[str, Any]:
        """Write the program."""
        torch.export.save(prepared.program, path)
        return {}

    def runner(self, path: Path, device: torch.device) -> Any:
        """Read the program."""
        return _without_gradients(torch.export.load(path).module())


class Onnx(Format):
    """ONNX from the dynamo exporter; onnxruntime runs it on the CPU."""

    name = "onnx"

    def suffix(self, device: torch.device) -> str:
        """Return the file's ending."""
        return ".onnx"

    def write(self, prepared: Prepared, path: Path) -> dict[str, Any]:
        """Write the graph with its weights inside."""
        _require("onnx", "onnxscript", "onnxruntime")
        if any(p.dtype == torch.bfloat16 for p in prepared.net.parameters()):
            raise ExportError("onnxruntime's CPU kernels have no bfloat16; export onnx with dtype fp32 or fp16")
        program = torch.onnx.export(prepared.program, dynamo=True, opset_version=OPSET, verbose=False)
        assert program is not None  # None comes with a file name only
        program.save(path)
        return {"opset": int(program.model.opset_imports[""])}

    def runner(self, path: Path, device: torch.device) -> Any:
        """Open an onnxruntime session; inputs go in by position."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]

        def run(inputs: Inputs) -> list[Tensor]:
            tensors = [t.detach().cpu().numpy() for t in tree_leaves(call_arguments(inputs)) if isinstance(t, Tensor)]
            return [torch.from_numpy(v) for v in session.run(None, dict(zip(names, tensors, strict=True)))]

        return run


class AotInductor(Format):
    """AOTInductor: code compiled for one kind of device that runs without Python; loading a file runs its code.

    PyTorch documents its entry points under ``torch._inductor``; there is no public name for them.
    """

    name = "aoti"

    def suffix(self, device: torch.device) -> str:
        """Return the file's ending; it names the kind of device."""
        return f".aoti-{device.type}.pt2"

    def write(self, prepared: Prepared, path: Path) -> dict[str, Any]:
        """Compile; needs a C++ compiler."""
        torch._inductor.aoti_compile_and_package(prepared.program, package_path=str(path))
        return {"gpu": torch.cuda.get_device_name(prepared.device)} if prepared.device.type == "cuda" else {}

    def runner(self, path: Path, device: torch.device) -> Any:
        """Load the package onto the device."""
        index = -1 if device.index is None else device.index
        return _without_gradients(torch._inductor.aoti_load_package(str(path), device_index=index))


FORMATS: dict[str, Format] = {f.name: f for f in (TorchExport(), Onnx(), AotInductor())}


def _without_gradients(function: Any) -> Any:
    def run(inputs: Inputs) -> Any:
        args, kwargs = call_arguments(inputs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return run


def _require(*packages: str) -> None:
    import importlib.util

    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise ExportError(f"format onnx needs {', '.join(missing)}: pip install 'widthkit[onnx]'")
