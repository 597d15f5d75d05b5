"""Earlier measurements on disk: one JSON file per device, whose name depends on everything that affects times."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from widthkit.errors import OptionError
from widthkit.files import atomic_json

FORMAT_VERSION = 1
Table = dict[tuple[int, ...], float]


def cache_dir() -> Path:
    """Return the folder of measurements: ``WIDTHKIT_CACHE``, or ``widthkit`` in the system's folder for caches."""
    given = os.environ.get("WIDTHKIT_CACHE")
    if given:
        return Path(given)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "widthkit"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "widthkit" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "widthkit"


def describe_device(device: str) -> dict[str, Any]:
    """Return what times depend on besides the operator: chip, clock, threads and versions."""
    found: dict[str, Any] = {"torch": torch.__version__, "widthkit_tables": FORMAT_VERSION}
    if torch.device(device).type == "cuda":
        index = torch.device(device).index or 0
        properties = torch.cuda.get_device_properties(index)
        found |= {
            "device": properties.name,
            "clock_khz": properties.clock_rate,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    elif torch.device(device).type == "cpu":
        found |= {
            "device": _processor(),
            "clock_khz": _read("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq"),
            "threads": torch.get_num_threads(),
            "onednn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
    else:
        found |= {"device": f"{device} of {platform.platform()}"}
    return found


def _processor() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


class Cache:
    """The cache file of one device.

    Args:
        device: Name of the device; :func:`describe_device` describes it.
        folder: Folder of the file; :func:`cache_dir` by default.

    A missing or damaged file counts as empty, because a cache can be measured again.
    """

    def __init__(self, device: str, folder: Path | None = None) -> None:
        self.device = describe_device(device)
        text = json.dumps(self.device, sort_keys=True)
        slug = re.sub(r"[^a-z0-9]+", "-", str(self.device["device"]).lower()).strip("-")[:40]
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        self.path = (folder or cache_dir()) / "latency" / f"{slug}-{digest}.json"
        self._data = self._load()

    def table(self, key: str) -> Table:
        """Return the measured points of a kernel: sizes -> seconds."""
        points = self._data["kernels"].get(key, {}).get("points", [])
        return {tuple(sizes): seconds for sizes, seconds in points}

    def add(self, key: str, table: Table, copied: bool) -> None:
        """Add measured points of a kernel to the earlier ones; :meth:`save` writes them."""
        merged = sorted({**self.table(key), **table}.items())
        points = [[list(sizes), seconds] for sizes, seconds in merged]
        self._data["kernels"][key] = {"copied": copied, "points": points}

    def copied(self, key: str) -> bool:
        """Whether a copy of a kernel's result was timed, because the kernel cannot run alone."""
        return bool(self._data["kernels"].get(key, {}).get("copied"))

    def networks(self, key: str) -> list[dict[str, Any]]:
        """Return the measured whole networks of one model under one set of conditions."""
        return list(self._data["networks"].get(key, []))

    def add_networks(self, key: str, rows: list[dict[str, Any]]) -> None:
        """Replace the measured networks of a key; :meth:`save` writes them."""
        self._data["networks"][key] = rows

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let one process measure at a time; a process that had to wait then has the other's measurements.

        Raises:
            OptionError: If the folder cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path.with_suffix(".lock"))
            lock.acquire()
        except OSError as error:
            raise OptionError(
                f"cannot write {self.path.parent}: {error.strerror or error}. Name another folder in WIDTHKIT_CACHE."
            ) from error
        try:
            self._data = self._merged()
            yield
        finally:
            lock.release()

    def save(self) -> None:
        """Write the file, together with what another process has added meanwhile.

        Raises:
            OptionError: If the folder cannot be written.
        """
        self._data = self._merged()
        atomic_json(self.path, {"format": FORMAT_VERSION, "device": self.device, **self._data})

    def _merged(self) -> dict[str, Any]:
        other = self._load()
        return {part: {**other[part], **self._data[part]} for part in ("kernels", "networks")}

    def _load(self) -> dict[str, Any]:
        empty: dict[str, Any] = {"kernels": {}, "networks": {}}
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT_VERSION:
                return empty
            for row in data["kernels"].values():
                _ = [(tuple(map(int, sizes)), float(seconds)) for sizes, seconds in row["points"]]
            return {part: dict(data[part]) for part in empty}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return empty
