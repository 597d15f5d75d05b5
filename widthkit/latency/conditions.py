"""The conditions of a measurement: device, batch size, number type, memory format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from widthkit.errors import BudgetError, first_line

DTYPE_WORDS = {
    "fp32": "float32",
    "float32": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "half": "float16",
}
MEMORY_FORMAT_WORDS = {"channels_last": True, "contiguous": False}
_ALL_WORDS = "a device (cpu, cuda:0), batch=8, a type (fp32, bf16, fp16) or a memory format (channels_last, contiguous)"
_DEVICE = re.compile(r"^[a-z]+(:[0-9]+)?$")
_LARGEST_BATCH = 1 << 20


@dataclass(frozen=True)
class Conditions:
    """How a network runs when it is deployed.

    Args:
        device: Name of the device; ``None`` if it does not matter.
        batch: Examples per pass.
        dtype: Type to which the model is cast; ``None`` keeps its own.
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
        """Make sure that this machine has the device, and that the device can compute in the type.

        Raises:
            BudgetError: If not; names the device and the reason.
        """
        name = self.device or "cpu"
        try:
            dtype = getattr(torch, self.dtype or "float32")
            torch.zeros(2, 2, dtype=dtype, device=name).add(1).sum().item()
        except (RuntimeError, AssertionError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
            raise BudgetError(
                f"device '{name}' cannot be used here: {first_line(error)}. "
                "Name a device of this machine, such as 1.8ms@cpu"
            ) from error


def read_conditions(words: Sequence[str], text: str) -> Conditions:
    """Read the words after the ``@`` of a budget.

    Args:
        words: The words, split at the commas.
        text: The whole budget, for messages.

    Raises:
        BudgetError: If a word is unknown, or two words say the same kind of thing.
    """
    found = Conditions()
    kinds: set[str] = set()
    for word in words:
        kind, found = _read(word.strip().lower(), found, text)
        if kind in kinds:
            raise BudgetError(f"budget '{text}' names its {kind} twice; leave one of them out")
        kinds.add(kind)
    return found


def _read(word: str, found: Conditions, text: str) -> tuple[str, Conditions]:
    if word in DTYPE_WORDS:
        return "type", replace(found, dtype=DTYPE_WORDS[word])
    if word in MEMORY_FORMAT_WORDS:
        return "memory format", replace(found, channels_last=MEMORY_FORMAT_WORDS[word])
    name, equals, number = word.partition("=")
    if equals and name == "batch":
        if not (number.isascii() and number.isdecimal() and 1 <= int(number) <= _LARGEST_BATCH):
            raise BudgetError(f"budget '{text}': '{word}' is no batch size; write a whole number from 1, like batch=8")
        return "batch size", replace(found, batch=int(number))
    if _DEVICE.match(word) and _is_device(word):
        return "device", replace(found, device="cpu" if word.startswith("cpu") else word)
    raise BudgetError(f"budget '{text}': '{word}' is neither {_ALL_WORDS}")


def _is_device(word: str) -> bool:
    try:
        kind = torch.device(word).type
    except RuntimeError:
        return False
    return kind != "meta"
