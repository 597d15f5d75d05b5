"""Measure how long tracing takes."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from rich.console import Console

from widthkit.bench.files import write
from widthkit.modules.models import create_model
from widthkit.trace import trace

DEFAULT = [
    "torchvision/resnet50",
    "torchvision/mobilenet_v2",
    "torchvision/densenet201",
    "timm/efficientnet_b0",
    "torchvision/shufflenet_v2_x1_0",
    "timm/convnext_tiny",
]


def run(models: list[str], repeats: int, out: Path | None) -> None:
    """Trace every model several times and print the median; another model is traced first, to pay for imports."""
    console = Console()
    trace(create_model("torchvision/resnet18"))
    rows = []
    for name in models:
        model = create_model(name)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            graph = trace(model)
            seconds.append(time.perf_counter() - start)
        rows.append(
            {
                "model": name,
                "seconds": statistics.median(seconds),
                "groups": len(graph.group_names),
                "units": int(graph.group_widths.sum()),
                "searchable_macs_share": graph.cost.searchable_share(graph.vector()),
            }
        )
        console.print(
            f"{name}: {rows[-1]['seconds']:.2f} s, {rows[-1]['groups']} groups, "
            f"{rows[-1]['searchable_macs_share']:.1%} of MACs searchable",
            highlight=False,
        )
    write(out, "trace", rows, repeats=repeats)
