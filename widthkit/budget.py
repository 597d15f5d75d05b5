"""Budgets: upper bounds on the cost of a network, as users write them (``"0.5x,12MB"``)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from widthkit.errors import BudgetError, Option
from widthkit.graph import ChannelGraph, FloatArray, Widths
from widthkit.graph.space import SearchSpace
from widthkit.latency import Conditions, LatencyModel, read_conditions
from widthkit.latency.model import Build

_SCALE = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_MILLISECONDS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
_LARGEST = 2**53
"""Costs are exact below this; larger bounds are cut to it."""
_NUMBER = r"^\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*"
_COUNT = re.compile(_NUMBER + r"([kMGT]?)\s*(x|macs|params)\s*$", re.IGNORECASE)
_MEMORY = re.compile(_NUMBER + r"((?:[kmgt]i?)?)(b)\s*$", re.IGNORECASE)
_LATENCY = re.compile(_NUMBER + r"(us|µs|ms|s)\s*$", re.IGNORECASE)
_BITS = re.compile(r"[KMGT]i?b\s*$")
"""A small b after a capital prefix may stand for bits."""
_STARTS_WITH_NUMBER = re.compile(r"^\s*[0-9.+-]")
_FORMS = (
    "budgets are in MACs (0.5x of the model's, 2.0GMACs) or params (3.1Mparams), memory (12MB, 12MiB@batch=16,fp16) "
    "or latency (1.8ms@cpu, 1.8ms@cuda:0,batch=8,channels_last,bf16), several with commas"
)


@dataclass(frozen=True)
class Limit:
    """One upper bound.

    Args:
        kind: ``"macs"`` (per example), ``"params"``, ``"memory"`` (bytes of weights and peak activations) or
            ``"latency"`` (milliseconds of one pass).
        value: The bound, inclusive.
        text: The bound as the user wrote it.
        conditions: For memory and latency: batch size, number type, device, memory format.
        latency: For latency: predicts milliseconds.
    """

    kind: str
    value: float
    text: str
    conditions: Conditions = field(default_factory=Conditions)
    latency: LatencyModel | None = field(default=None, compare=False, repr=False)

    def cost(self, graph: ChannelGraph, widths: Any) -> Any:
        """Return the cost of widths in the bound's unit: a number for one width vector, else an array ``[...]``."""
        if self.kind == "latency":
            assert self.latency is not None
            return self.latency.predict_ms(graph.vector(widths))
        if self.kind == "memory":
            return graph.memory(widths, batch=self.conditions.batch, dtype=self.conditions.dtype)
        return graph.macs(widths) if self.kind == "macs" else graph.params(widths)

    def show(self, cost: float) -> str:
        """Write a cost with the unit of the bound.

        >>> Limit("macs", 10, "10MACs").show(12345), Limit("memory", 10, "10B").show(12345)
        ('12.3k MACs', '12.3 kB')
        >>> Limit("latency", 10, "10ms").show(1.2345)
        '1.23 ms'
        """
        if self.kind == "latency":
            return f"{cost:.3g} ms"
        if self.kind == "memory":
            count = show_count(cost)
            return f"{count[:-1]} {count[-1]}B" if count[-1].isalpha() else f"{count} B"
        return f"{show_count(cost)} {'MACs' if self.kind == 'macs' else 'params'}"


@dataclass(frozen=True)
class Budget:
    """Upper bounds that must all hold.

    >>> from torch import nn
    >>> from widthkit.trace import trace
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> graph = trace(net, (1, 3, 8, 8))
    >>> budget = parse_budget("0.5x", graph)
    >>> budget.fits(graph, {"0": 4}), budget.fits(graph, {"0": 5})
    (True, False)
    """

    limits: tuple[Limit, ...]

    def costs(self, graph: ChannelGraph, widths: Any) -> FloatArray:
        """Return ``[..., limits]``: every cost as a fraction of its bound."""
        columns = [np.asarray(limit.cost(graph, widths), dtype=np.float64) / limit.value for limit in self.limits]
        return np.stack(columns, axis=-1)

    def usage(self, graph: ChannelGraph, widths: Any) -> Any:
        """Return ``[...]``: the largest fraction of all bounds; widths are inside the budget at 1 or less."""
        worst = self.costs(graph, widths).max(axis=-1)
        return float(worst) if worst.ndim == 0 else worst

    def fits(self, graph: ChannelGraph, widths: Widths) -> bool:
        """Whether all bounds hold; MACs, parameters and memory exactly, latency by its prediction."""
        return all(limit.cost(graph, widths) <= limit.value for limit in self.limits)

    def check(self, space: SearchSpace) -> None:
        """Refuse a budget that even the narrowest network exceeds. For a latency budget this measures the kernels.

        Raises:
            BudgetError: If it does; names the cost of the narrowest network.
        """
        narrow = space.smallest
        if not self.fits(space.graph, narrow):
            macs, params = space.graph.macs(narrow), space.graph.params(narrow)
            shown = [f"{show_count(macs)} MACs, {show_count(params)} params"]
            shown += [m.show(m.cost(space.graph, narrow)) for m in self.limits if m.kind in ("memory", "latency")]
            raise BudgetError(
                f"budget {self} is below the narrowest network of this space ({', '.join(shown)}); "
                "raise the budget or lower ",
                Option("min_width"),
            )

    def __str__(self) -> str:
        return " and ".join(limit.text for limit in self.limits)


def parse_budget(text: str | Sequence[str] | Budget, graph: ChannelGraph, build: Build | None = None) -> Budget:
    """Read a budget.

    Args:
        text: ``"0.5x"`` (of the model's own MACs), ``"2.0GMACs"``, ``"3.1Mparams"``, ``"12MB"`` or ``"12MiB@batch=16"``
            (weights and peak activations), ``"1.8ms@cpu,batch=8,channels_last,bf16"`` (predicted latency). Several
            bounds are joined by commas or given as a sequence; all must hold. The words after an ``@`` belong to the
            bound before it, up to the next number.
        graph: The model's channel graph.
        build: Builds the network of given widths; predicted latencies are corrected on such networks.

    Raises:
        BudgetError: If it cannot be read, allows nothing at all, or names a device that this machine lacks.
    """
    if isinstance(text, Budget):
        return text
    parts = _split(text) if isinstance(text, str) else list(text) if isinstance(text, Iterable) else [text]
    if not parts:
        raise BudgetError(f"no budget is given; {_FORMS}")
    return Budget(tuple(_limit(part, graph, build) for part in parts))


def _split(text: str) -> list[str]:
    """Split at the commas; words after an ``@`` stay with the bound that they describe.

    >>> _split("0.5x,12MB@batch=16,bf16,1.8ms@cpu,batch=8")
    ['0.5x', '12MB@batch=16,bf16', '1.8ms@cpu,batch=8']
    """
    parts: list[str] = []
    for part in text.split(","):
        if parts and "@" in parts[-1] and not _STARTS_WITH_NUMBER.match(part):
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return parts


def _limit(text: Any, graph: ChannelGraph, build: Build | None) -> Limit:
    if not isinstance(text, str):
        raise BudgetError(f"budget '{text}' cannot be read; {_FORMS}")
    amount, at, words = text.partition("@")
    memory, latency = _MEMORY.match(amount), _LATENCY.match(amount)
    if memory and not _BITS.search(amount):
        return _memory_limit(amount, text, _conditions(at, words, text), graph)
    if latency:
        return _latency_limit(latency, text, _conditions(at, words, text), graph, build)
    found = _COUNT.match(amount)
    unit = found.group(3).lower() if found else ""
    if found is None or (unit == "x" and found.group(2)):
        raise BudgetError(f"budget '{text}' {_complaint(amount)}; {_FORMS}")
    if at:
        raise BudgetError(f"budget '{text}': MACs and parameters are per example on any device; leave '@{words}' out")
    value = _count(found.group(1), _SCALE[found.group(2).upper()] if unit != "x" else graph.macs())
    if value < 1:
        raise BudgetError(f"budget '{text}' allows nothing at all; it must be at least one multiply-add or parameter")
    return Limit("params" if unit == "params" else "macs", value, text.strip())


def _conditions(at: str, words: str, text: str) -> Conditions:
    return read_conditions(words.split(","), text) if at else Conditions()


def _memory_limit(amount: str, text: str, at: Conditions, graph: ChannelGraph) -> Limit:
    if at.device is not None or at.channels_last:
        raise BudgetError(f"budget '{text}': memory depends on batch= and the type alone; leave the rest out")
    value = memory_amount(amount)
    assert value is not None
    if value < 1:
        raise BudgetError(f"budget '{text}' allows nothing at all; it must be at least one byte")
    graph.memory(batch=at.batch, dtype=at.dtype)  # refuses a batch size that the model does not run at
    return Limit("memory", value, text.strip(), at)


def memory_amount(text: str) -> int | None:
    """Return an amount of memory in bytes, written with or without a B; ``None`` if it cannot be read.

    >>> memory_amount("2GB"), memory_amount("1.5 MiB"), memory_amount("300k"), memory_amount("3 apples")
    (2000000000, 1572864, 300000, None)
    """
    found = _MEMORY.match(text) or _MEMORY.match(text + "B")
    if found is None or _BITS.search(text):
        return None
    prefix = found.group(2).upper()
    return _count(found.group(1), _BINARY[prefix] if prefix in _BINARY else _SCALE[prefix])


def _latency_limit(found: re.Match[str], text: str, at: Conditions, graph: ChannelGraph, build: Build | None) -> Limit:
    value = float(found.group(1)) * _MILLISECONDS[found.group(2).lower()]
    if not 0 < value < float("inf"):
        raise BudgetError(f"budget '{text}' cannot be met; a latency is a positive, finite time")
    return Limit("latency", value, text.strip(), at, LatencyModel(graph, at, build))


def _count(number: str, scale: int) -> int:
    """Multiply exactly: 2.3 times 10**6 is 2300000, but 2299999 in floats."""
    if float(number) * scale >= _LARGEST:
        return _LARGEST
    return 0 if float(number) < 1e-30 else int(Fraction(number) * scale)


def _complaint(text: str) -> str:
    """Say what is wrong with a budget: a unit that is not known here, or something else."""
    if re.search(r"[0-9]\s*[KMGT]i?b\s*$", text):
        return "is in bits or bytes, which a small b leaves open: write MB for bytes"
    if re.search(r"[0-9]\s*([kmgt]i?)?bytes?\s*$", text, re.IGNORECASE):
        return "is in bytes: write B, kB, MB or MiB"
    if re.search(r"[0-9]\s*(ns|min|h|fps|hz)\s*$", text, re.IGNORECASE):
        return "is a time or rate in another unit: write us, ms or s of one pass"
    if re.search(r"flops?\s*$", text, re.IGNORECASE):
        return "is in FLOPs, which some count as one and some as two per multiply-add"
    return "cannot be read"


def show_count(value: float) -> str:
    """Write a count with three significant digits.

    >>> show_count(1814073344), show_count(37000), show_count(12)
    ('1.81G', '37.0k', '12')
    """
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}" if value / scale >= 100 else f"{value / scale:#.3g}{unit}"
    return f"{value:g}"
