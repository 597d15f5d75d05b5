"""Write the results of a benchmark with versions, device and date."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch

from widthkit.files import atomic_json
from widthkit.version import versions


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe where a benchmark ran."""
    found: dict[str, Any] = {
        "device": device,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def write(path: Path | None, name: str, rows: Any, device: str = "cpu", **more: Any) -> None:
    """Write a benchmark's JSON file, if a path was given."""
    if path is not None:
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        record = {"benchmark": name, "date": today, "versions": versions(), "machine": machine(device), **more}
        atomic_json(path, {**record, "rows": rows})
