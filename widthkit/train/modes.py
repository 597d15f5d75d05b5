"""Small helpers around a module: its modes, its device, how to call it, how to read a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from widthkit.errors import DataError, Option, OptionError, first_line


@contextmanager
def training_flags(model: nn.Module) -> Iterator[None]:
    """Put every module's training flag back when the scope ends, whatever happened inside.

    >>> net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    >>> with training_flags(net):
    ...     _ = net.eval()
    >>> net[0].training, net[1].training
    (True, False)
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            _set_flag(module, flag)


def eval_mode(model: nn.Module) -> None:
    """Call ``model.eval()``, in less time where no module has a ``train`` of its own.

    >>> net = nn.Sequential(nn.Dropout())
    >>> eval_mode(net)
    >>> net.training, net[0].training
    (False, False)
    """
    modules = list(model.modules())
    if any(_of_its_own(module) for module in modules):
        model.eval()
        return
    for module in modules:
        _set_flag(module, False)


def _of_its_own(module: nn.Module) -> bool:
    """Whether a class, or one module alone, says for itself what training and evaluation mean."""
    kind, own = type(module), vars(module)
    return kind.train is not nn.Module.train or kind.eval is not nn.Module.eval or "train" in own or "eval" in own


def _set_flag(module: nn.Module, flag: bool) -> None:
    own = vars(module)
    # Setting an attribute of a module takes 20 times as long as this, and judging sets thousands.
    if "training" in own:
        own["training"] = flag
    else:
        module.training = flag


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Run ``model`` on a tensor, on a tuple or list of positional inputs, or on a dict of keyword inputs.

    >>> call_model(nn.Bilinear(2, 2, 1), (torch.ones(3, 2), torch.ones(3, 2))).shape
    torch.Size([3, 1])
    """
    args, kwargs = as_arguments(inputs)
    return model(*args, **kwargs)


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn a batch's inputs into positional and keyword arguments.

    >>> as_arguments([1, 2]), as_arguments({"x": 1}), as_arguments("text")
    (((1, 2), {}), ((), {'x': 1}), (('text',), {}))
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def channels_last(inputs: Any) -> Any:
    """Give the images among a batch's inputs, which are tensors of four dims, the memory format ``channels_last``.

    >>> channels_last({"images": torch.zeros(2, 3, 4, 4), "sizes": torch.zeros(2)})["images"].stride()
    (48, 1, 12, 3)
    """
    return recursively_apply(
        lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
        inputs,
        test_type=lambda value: isinstance(value, Tensor) and value.ndim == 4,
    )


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Take a batch apart into ``(inputs, targets)``.

    Raises:
        DataError: If the batch is not a pair.

    >>> split_batch(["images", "labels"])
    ('images', 'labels')
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        shown = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise DataError(f"a batch must be a pair (inputs, targets), this loader gives a {shown}; wrap the loader.")
    return batch[0], batch[1]


def batch_size(inputs: Any) -> int:
    """Count the samples of a batch: the length of the first tensor found in it, or of the first argument's list.

    Raises:
        DataError: If there is no tensor with at least one dimension.

    >>> batch_size({"pixels": torch.zeros(5, 3), "mask": None})
    5
    >>> batch_size(([torch.zeros(3, 8, 8), torch.zeros(3, 9, 7)], ["first", "second"]))
    2
    """
    parts = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    if isinstance(parts, (tuple, list)) and parts and isinstance(parts[0], (tuple, list)):
        return len(parts[0])  # images of different sizes, as detectors take them
    size = _first_length(inputs)
    if size is None:
        raise DataError(f"a batch of type {type(inputs).__name__} holds no tensor; return tensors from the loader.")
    return size


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer; the CPU if it has neither."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def checked_device(device: str | torch.device | None) -> torch.device | None:
    """Read a device name and make sure that this machine has it.

    Raises:
        OptionError: If the name is not a device's, or the device is not there.

    >>> checked_device("cpu")
    device(type='cpu')
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, TypeError) as error:
        raise OptionError(
            Option("device", str(device)), f" cannot be used here: {first_line(error)}. Try ", Option("device", "cpu")
        ) from error
    return found


def _first_length(value: Any) -> int | None:
    if isinstance(value, Tensor):
        return int(value.shape[0]) if value.ndim else None
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((size for size in map(_first_length, parts) if size is not None), None)
