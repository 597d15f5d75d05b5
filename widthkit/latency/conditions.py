"""Under which conditions a network is measured: device, batch size, number type, memory format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from widthkit.errors import BudgetError

DTYPES = {
    "fp32": "float32",
    "float32": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "half": "float16",
}
FORMATS = {"channels_last": True, "contiguous": False}
WORDS = "a device (cpu, cuda:0), batch=8, a type (fp32, bf16, fp16) or a memory format (channels_last, contiguous)"
_DEVICE = re.compile(r"^[a-z]+(:[0-9]+)?$")
_MOST = 1 << 20


@dataclass(frozen=True)
class Conditions:
    """How a network runs where it is deployed.

    Args:
        device: Name of the device; ``None`` where it does not matter.
        batch: Examples per pass.
        dtype: Type the model is cast to; ``None`` leaves it as it is.
        channels_last: Memory format of images and kernels.

    >>> str(read_conditions(["cuda:0", "batch=8", "channels_last", "bf16"], "1ms"))
    'cuda:0,batch=8,bfloat16,channels_last'
    """

    device: str | None = None
    batch: int = 1
    dtype: str | None = None
    channels_last: bool = False

    def __str__(self) -> str:
        words = [self.device or "", f"batch={self.batch}" if self.batch != 1 else "", self.dtype or ""]
        return ",".join(w for w in [*words, "channels_last" if self.channels_last else ""] if w)

    def check(self) -> None:
        """Make sure that the device is here and knows the type.

        Raises:
            BudgetError: Naming the device and the reason.
        """
        name = self.device or "cpu"
        try:
            dtype = getattr(torch, self.dtype or "float32")
            torch.zeros(2, 2, dtype=dtype, device=name).add(1).sum().item()
        except (RuntimeError, AssertionError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
            raise BudgetError(
                f"device '{name}' cannot be used here: {_first_line(error)}. "
                "Name a device of this machine, such as 1.8ms@cpu"
            ) from error


def read_conditions(words: Sequence[str], text: str) -> Conditions:
    """Read what stands behind the ``@`` of a budget.

    Args:
        words: The words between the commas.
        text: The whole budget, for messages.

    Raises:
        BudgetError: If a word is unknown, or says again what another has said.
    """
    found = Conditions()
    said: set[str] = set()
    for word in words:
        kind, found = _read(word.strip().lower(), found, text)
        if kind in said:
            raise BudgetError(f"budget '{text}' names its {kind} twice")
        said.add(kind)
    return found


def _read(word: str, found: Conditions, text: str) -> tuple[str, Conditions]:
    if word in DTYPES:
        return "type", replace(found, dtype=DTYPES[word])
    if word in FORMATS:
        return "memory format", replace(found, channels_last=FORMATS[word])
    name, equals, number = word.partition("=")
    if equals and name == "batch":
        if not (number.isascii() and number.isdecimal() and 1 <= int(number) <= _MOST):
            raise BudgetError(f"budget '{text}': '{word}' is no batch size; write a whole number from 1, like batch=8")
        return "batch size", replace(found, batch=int(number))
    if _DEVICE.match(word) and _is_device(word):
        return "device", replace(found, device="cpu" if word.startswith("cpu") else word)
    raise BudgetError(f"budget '{text}': '{word}' is neither {WORDS}")


def _is_device(word: str) -> bool:
    try:
        kind = torch.device(word).type
    except RuntimeError:
        return False
    return kind != "meta"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
