"""Export several models in every format: whether that works, how far off the result is, how long it takes."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from widthkit.bench.files import write
from widthkit.errors import ExportError
from widthkit.export import export, save
from widthkit.modules.models import create_model
from widthkit.trace import trace
from widthkit.train import recalibrate

DEFAULT = (
    "torchvision/resnet18",
    "torchvision/mobilenet_v2",
    "timm/efficientnet_b0",
    "torchvision/densenet121",
    "timm/convnext_atto",
    "timm/vit_tiny_patch16_224",
)
FORMATS = ("safetensors", "pt2", "onnx", "aoti")


def run(models: list[str], formats: list[str], dtype: str | None, size: int, device: str, out: Path | None) -> None:
    """Halve every width of every model, export it in every format, and print the largest difference."""
    console = Console()
    rows = []
    for name in models:
        options: dict[str, Any] = {"num_classes": 10, **({"img_size": size} if "vit" in name else {})}
        slim = half(name, size, options)
        for format_ in formats:
            row = {"model": name, **measure(slim, format_, dtype, size, device, name, options)}
            rows.append(row)
            said = row.get("error") or f"{row['relative']:.1e} of the largest output, {row['seconds']:.1f} s"
            console.print(f"{name} {format_}: {said}", highlight=False, soft_wrap=True)
            write(out, "formats", rows, device, dtype=dtype or "fp32", size=size)


def half(name: str, size: int, options: dict[str, Any]) -> nn.Module:
    """Return a model at half of every width; batch norms are recalibrated on noise, or outputs would be tiny."""
    torch.manual_seed(0)
    dense = create_model(name, **options)
    graph = trace(dense, (1, 3, size, size))
    slim = export(dense, {name: max(1, width // 2) for name, width in graph.full.items()}, graph=graph)
    recalibrate(slim, [(torch.randn(16, 3, size, size), None)])
    return slim.eval()


def measure(
    slim: nn.Module, format_: str, dtype: str | None, size: int, device: str, model: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Export one network in one format; the row holds the difference between the file and the network."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            path, *_ = save(
                slim,
                Path(folder) / "slim",
                formats=[format_],
                model=model,
                kwargs=options,
                example_inputs=(2, 3, size, size),
                dtype=dtype,
                device=device,
                say=None,
            )
        except ExportError as error:
            return {"format": format_, "error": str(error)}
        record = json.loads(path.with_name(path.name + ".json").read_text())
        relative = max(c["largest_difference"] / c["largest_output"] for c in record["checks"])
        found = {"format": format_, "relative": relative, "allowed": record["checks"][0]["tolerance"]}
        return {**found, "bytes": path.stat().st_size, "seconds": time.perf_counter() - start}
