"""Budgets: what a network may cost, in words people write."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from widthkit.errors import BudgetError
from widthkit.graph import ChannelGraph, Widths
from widthkit.space import SearchSpace

_SCALE = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_LARGEST = 2**53
"""Costs are exact below this; a bound above it is no bound."""
_FORM = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([kMGT]?)\s*(x|macs|params)\s*$", re.IGNORECASE)


_FORMS = "budgets are in MACs (0.5x of the model's, 2.0GMACs) or params (3.1Mparams), several with commas"


@dataclass(frozen=True)
class Limit:
    """One upper bound.

    Args:
        kind: ``"macs"`` (per example) or ``"params"``.
        value: The bound, inclusive.
        text: As the user wrote it.
    """

    kind: str
    value: int
    text: str


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

    def costs(self, graph: ChannelGraph, widths: Any) -> npt.NDArray[np.float64]:
        """Return ``[..., limits]``: every cost as a fraction of its bound."""
        values = [graph.macs(widths) if limit.kind == "macs" else graph.params(widths) for limit in self.limits]
        columns = [np.asarray(v, dtype=np.float64) / limit.value for v, limit in zip(values, self.limits, strict=True)]
        return np.stack(columns, axis=-1)

    def usage(self, graph: ChannelGraph, widths: Any) -> Any:
        """Return ``[...]``: the tightest bound's fraction; at most 1 is inside the budget."""
        worst = self.costs(graph, widths).max(axis=-1)
        return float(worst) if worst.ndim == 0 else worst

    def fits(self, graph: ChannelGraph, widths: Widths) -> bool:
        """Whether all bounds hold, exactly."""
        return all(
            (graph.macs(widths) if limit.kind == "macs" else graph.params(widths)) <= limit.value
            for limit in self.limits
        )

    def check(self, space: SearchSpace) -> None:
        """Refuse a budget that even the narrowest network exceeds.

        Raises:
            BudgetError: Naming the narrowest network's cost.
        """
        narrow = space.smallest
        if not self.fits(space.graph, narrow):
            macs, params = space.graph.macs(narrow), space.graph.params(narrow)
            raise BudgetError(
                f"budget {self} is below the narrowest network of this space ({show_count(macs)} MACs, "
                f"{show_count(params)} params); raise the budget or lower min_width"
            )

    def __str__(self) -> str:
        return " and ".join(limit.text for limit in self.limits)


def parse_budget(text: str | Sequence[str] | Budget, graph: ChannelGraph) -> Budget:
    """Read a budget.

    Args:
        text: ``"0.5x"`` (of the model's own MACs), ``"2.0GMACs"``, ``"3.1Mparams"``, several joined by commas or given
            as a sequence; all must hold.
        graph: The model's channel graph.

    Raises:
        BudgetError: If it cannot be read, or allows not even one multiply-add or parameter.
    """
    if isinstance(text, Budget):
        return text
    parts = text.split(",") if isinstance(text, str) else list(text) if isinstance(text, Iterable) else [text]
    if not parts:
        raise BudgetError(f"no budget is given; {_FORMS}")
    return Budget(tuple(_limit(part, graph) for part in parts))


def _limit(text: str, graph: ChannelGraph) -> Limit:
    found = _FORM.match(text) if isinstance(text, str) else None
    unit = found.group(3).lower() if found else ""
    if found is None or (unit == "x" and found.group(2)):
        raise BudgetError(f"budget '{text}' {_complaint(text)}; {_FORMS}")
    value = _count(found.group(1), _SCALE[found.group(2).upper()] if unit != "x" else graph.macs())
    if value < 1:
        raise BudgetError(f"budget '{text}' allows nothing at all; it must be at least one multiply-add or parameter")
    return Limit("params" if unit == "params" else "macs", value, text.strip())


def _count(number: str, scale: int) -> int:
    """Multiply as people do on paper: 2.3 times 10**6 is 2300000, which floats miss."""
    if float(number) * scale >= _LARGEST:
        return _LARGEST
    return 0 if float(number) < 1e-30 else int(Fraction(number) * scale)


def _complaint(text: Any) -> str:
    """Say what is wrong with a budget: a unit that people write elsewhere, or something else."""
    if isinstance(text, str) and re.search(r"[0-9]\s*([kmgt]i?)?b(ytes)?\s*$", text, re.IGNORECASE):
        return "is a memory budget, which is not supported yet"
    if isinstance(text, str) and re.search(r"[0-9]\s*(us|ms|s)\s*(@.*)?$", text, re.IGNORECASE):
        return "is a latency budget, which is not supported yet"
    if isinstance(text, str) and re.search(r"flops?\s*$", text, re.IGNORECASE):
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
