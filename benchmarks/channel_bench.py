"""Channel-Bench-Macro: spaces of 16,384 widths, every network of which was trained three times on CIFAR-10.

The networks are built here and traced, so that spaces and costs are made as for any model; the multiply-adds in the
files are compared with those of the graph.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from widthkit.errors import DataError
from widthkit.graph import FloatArray, IntArray
from widthkit.graph.space import SearchSpace, uniform_space
from widthkit.trace import trace

_INPUT = (1, 3, 32, 32)
_RUNS = 3


class _Residual(nn.Module):
    """A body and, if the shape stays, a skip connection."""

    def __init__(self, body: nn.Module, skip: bool) -> None:
        super().__init__()
        self.body, self.skip = body, skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + y if self.skip else y  # type: ignore[no-any-return]


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU() if relu else nn.Identity())


def _inverted(inputs: int, hidden: int, outputs: int, stride: int = 1) -> nn.Module:
    body = nn.Sequential(
        _conv(inputs, hidden, 1), _conv(hidden, hidden, 3, stride, hidden), _conv(hidden, outputs, 1, relu=False)
    )
    return _Residual(body, skip=inputs == outputs and stride == 1)


def _basic(inputs: int, hidden: int, outputs: int, stride: int = 1) -> nn.Module:
    body = nn.Sequential(_conv(inputs, hidden, 3, stride), _conv(hidden, outputs, 3, relu=False))
    return _Residual(body, skip=inputs == outputs and stride == 1)


def _mobilenet() -> nn.Module:
    blocks = [
        _inverted(128, 768, 128),
        _inverted(128, 768, 128),
        _inverted(128, 768, 256, 2),
        _inverted(256, 1536, 256),
    ]
    head = [_conv(256, 1024, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 10)]
    return nn.Sequential(_conv(3, 128, 3, 2), *blocks, *head)


def _resnet() -> nn.Module:
    blocks = [_basic(256, 256, 256), _basic(256, 256, 256), _basic(256, 512, 512, 2)]
    blocks += [_basic(512, 512, 512), _basic(512, 512, 512)]
    return nn.Sequential(_conv(3, 256, 3, 2), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"MobileNet": _mobilenet, "ResNet": _resnet}
"""Name in the file names -> the network of full width."""


@dataclass(frozen=True)
class ChannelBench:
    """One space with its ground truth.

    Args:
        name: ``MobileNet`` or ``ResNet``.
        space: Four widths per group.
        keys: The networks' digits.
        widths: ``[n, groups]``.
        accuracy: ``[n, 3]``; test accuracy in percent of three trainings.
        macs: ``[n]``.
    """

    name: str
    space: SearchSpace
    keys: tuple[str, ...]
    widths: IntArray
    accuracy: FloatArray
    macs: IntArray

    def scores(self, path: Path) -> FloatArray:
        """Read published supernet scores: ``[n]``, NaN where there is none.

        Raises:
            DataError: If the file cannot be read or scores none of these networks.
        """
        found = _read(path)
        values = np.array([float(found.get(key, np.nan)) for key in self.keys])
        if not np.isfinite(values).any():
            raise DataError(f"{path} scores none of the networks of {self.name}")
        return values


def load(folder: Path, name: str = "MobileNet") -> ChannelBench:
    """Read ``Results_NAME.json``, trace the network and compare the costs.

    Raises:
        DataError: If the file is missing, damaged, or counts other costs than the traced network has.
    """
    if name not in NETWORKS:
        raise DataError(f"unknown space '{name}'; Channel-Bench-Macro has {' and '.join(NETWORKS)}")
    path = folder / f"Results_{name}.json"
    table = _read(path)
    space = uniform_space(trace(NETWORKS[name](), _INPUT), 4)
    keys = tuple(sorted(table))
    try:
        widths = np.array(
            [[g.options[int(d) - 1] for g, d in zip(space.groups, key, strict=True)] for key in keys], dtype=np.int64
        )
        accuracy = np.array([table[key]["acc"] for key in keys], dtype=np.float64)
        macs = np.array([table[key]["flops"] for key in keys], dtype=np.int64)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a table of Channel-Bench-Macro ({type(error).__name__}: {error})") from error
    if accuracy.shape != (len(keys), _RUNS):
        raise DataError(f"{path}: every network needs {_RUNS} accuracies")
    if not np.array_equal(macs, space.graph.macs(widths)):
        raise DataError(f"{path}: the counted multiply-adds are not those of the {name} network built here")
    return ChannelBench(name, space, keys, widths, accuracy, macs)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); --data-dir names its folder") from error
    if not isinstance(found, dict) or not found:
        raise DataError(f"{path} holds no table")
    return found
