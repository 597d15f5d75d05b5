"""Keep timm's ``feature_info`` true: after slimming it must name the channels that the network has."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from widthkit.export.check import call_arguments
from widthkit.modules.clone import meta_clone
from widthkit.trace.inputs import Inputs, likely_inputs


def refresh_feature_info(net: nn.Module) -> None:
    """Set ``num_chs`` of a timm network's ``feature_info`` to what its modules give; others are left alone.

    The network runs on the meta device; ``feature_info`` must be the network's own, as it is in a deep copy.
    """
    info: Any = getattr(net, "feature_info", None)
    rows = info if isinstance(info, list) else getattr(info, "info", None)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "num_chs" in row for row in rows):
        return
    for inputs in likely_inputs(net):
        with contextlib.suppress(Exception):
            _refresh(net, rows, list(getattr(info, "out_indices", ())), inputs)
            return


def _refresh(net: nn.Module, rows: list[dict[str, Any]], indices: list[int], inputs: Inputs) -> None:
    clone = meta_clone(net).eval()
    paths = dict(clone.named_modules())
    seen: dict[str, Tensor] = {}
    for row in rows:
        module = paths.get(str(row.get("module")))
        if module is not None:
            module.register_forward_hook(_keep(seen, str(row["module"])))
    args, kwargs = call_arguments(tuple(t.to("meta") if isinstance(t, Tensor) else t for t in inputs))
    with torch.no_grad():
        result = clone(*args, **kwargs)
    last = getattr(net, "output_fmt", None) in ("NHWC", "NLC")
    for row in rows:
        value = seen.get(str(row["module"]))
        if value is not None:
            row["num_chs"] = _channels(value, last)
    # A features_only network hands its maps out; the modules behind them may have been flattened away.
    if indices and isinstance(result, (list, tuple)) and len(result) == len(indices):
        for index, value in zip(indices, result, strict=True):
            rows[index]["num_chs"] = _channels(value, last)


def _keep(seen: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, args: Any, result: Any) -> None:
        if isinstance(result, Tensor):
            seen[name] = result

    return hook


def _channels(value: Tensor, last: bool) -> int:
    return int(value.shape[-1] if last or value.ndim == 3 else value.shape[1])
