"""Update timm's ``feature_info``: after slimming it must name the channels that the network has."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import FeatureInfo
from torch import Tensor, nn

from widthkit.errors import one_line
from widthkit.export.check import call_arguments
from widthkit.modules.clone import meta_clone
from widthkit.trace.inputs import Inputs, likely_inputs


def refresh_feature_info(net: nn.Module) -> None:
    """Set ``num_chs`` of a timm network's ``feature_info`` to the channels of its modules; other networks stay.

    A copy of the network runs on the meta device. ``feature_info`` must be the network's own, as it is in a deep copy.

    Warns:
        UserWarning: If the network runs on none of the usual image sizes; ``feature_info`` is then out of date.
    """
    info = getattr(net, "feature_info", None)
    rows = info.info if isinstance(info, FeatureInfo) else info
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "num_chs" in row for row in rows):
        return
    failure = "no example input is known"
    for inputs in likely_inputs(net):
        try:
            seen, result = _run_on_meta(net, rows, inputs)
        except Exception as error:  # a model may raise anything on an image size that it does not take
            failure = f"{type(error).__name__}: {one_line(error)}"
        else:
            _write_channels(net, rows, seen, result, info.out_indices if isinstance(info, FeatureInfo) else ())
            return
    warnings.warn(
        f"feature_info of {type(net).__name__} still names the dense channel counts: the network runs on no usual "
        f"image size ({failure}); set its num_chs entries yourself before you build a feature extractor",
        stacklevel=4,
    )


def _run_on_meta(net: nn.Module, rows: list[dict[str, Any]], inputs: Inputs) -> tuple[dict[str, Tensor], Any]:
    """Return the outputs of the modules that ``rows`` name, and the network's own output."""
    clone = meta_clone(net).eval()
    paths = dict(clone.named_modules())
    seen: dict[str, Tensor] = {}
    for row in rows:
        module = paths.get(str(row.get("module")))
        if module is not None:
            module.register_forward_hook(_store_output(seen, str(row["module"])))
    args, kwargs = call_arguments(tuple(t.to("meta") if isinstance(t, Tensor) else t for t in inputs))
    with torch.no_grad():
        return seen, clone(*args, **kwargs)


def _write_channels(
    net: nn.Module, rows: list[dict[str, Any]], seen: dict[str, Tensor], result: Any, indices: Sequence[int]
) -> None:
    channels_last = getattr(net, "output_fmt", None) in ("NHWC", "NLC")
    for row in rows:
        value = seen.get(str(row.get("module")))
        if value is not None:
            row["num_chs"] = _channels(value, channels_last)
    # A features_only network returns its maps itself; timm may have flattened away the modules that rows name.
    if indices and isinstance(result, (list, tuple)) and len(result) == len(indices):
        for index, value in zip(indices, result, strict=True):
            rows[index]["num_chs"] = _channels(value, channels_last)


def _store_output(seen: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, args: Any, result: Any) -> None:
        if isinstance(result, Tensor):
            seen[name] = result

    return hook


def _channels(value: Tensor, channels_last: bool) -> int:
    return int(value.shape[-1] if channels_last or value.ndim == 3 else value.shape[1])
