"""Draw networks and widths, check them, and shrink each failure to the smallest network that still fails."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from benchmarks.fuzz.check import check
from benchmarks.fuzz.nets import LEAVES, NESTS, Recipe
from widthkit.bench.files import write
from widthkit.errors import OptionError

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

_CHUNK = 250
"""Examples between two lines of progress; each chunk has a seed of its own."""


def recipes(leaves: int = 6, blocks: int = 4) -> SearchStrategy[list[Recipe]]:
    """Lists of up to ``blocks`` blocks, nested up to several levels, of about ``leaves`` leaves each."""
    from hypothesis import strategies as st

    leaf = st.tuples(st.sampled_from(sorted(LEAVES)), st.tuples(st.integers(1, 6)))
    tree = st.recursive(
        leaf,
        lambda inner: st.tuples(st.sampled_from(NESTS), st.lists(inner, min_size=1, max_size=3).map(tuple)),
        max_leaves=leaves,
    )
    return st.lists(tree, min_size=1, max_size=blocks)


def run(examples: int, seed: int | None, out: Path | None) -> int:
    """Check many networks, print every failure as a command that repeats it, and return the number of failures.

    Args:
        examples: How many networks.
        seed: Seed of the networks; drawn and printed if it is ``None``.
        out: Result file.

    Raises:
        OptionError: If hypothesis is not installed.
    """
    try:
        import hypothesis
    except ImportError as error:
        raise OptionError("fuzz needs hypothesis; install it with: pip install 'widthkit[test]'") from error
    torch.set_num_threads(1)
    seed = secrets.randbelow(2**31) if seed is None else seed
    console = Console()
    console.print(f"seed {seed}; the same seed draws the same networks", highlight=False)
    failures: list[dict[str, Any]] = []
    for start in range(0, examples, _CHUNK):
        found = _chunk(min(_CHUNK, examples - start), hypothesis.seed(seed + start))
        if found is not None:
            failures.append(found)
            _report(console, found)
        console.print(f"{min(start + _CHUNK, examples)}/{examples}: {len(failures)} failures", highlight=False)
    write(out, "fuzz", failures, examples=examples, seed=seed)
    return len(failures)


def _chunk(examples: int, seeded: Any) -> dict[str, Any] | None:
    """Check some networks; return the smallest failing one, or ``None`` if none fails."""
    import hypothesis
    from hypothesis import strategies as st

    last: dict[str, Any] = {}

    def attempt(recipe: list[Recipe], flat: bool, widths: int) -> None:
        last.update(recipe=recipe, flat=flat, seed=widths)
        check(recipe, flat, widths)

    limits = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    drawn = hypothesis.given(recipe=recipes(), flat=st.booleans(), widths=st.integers(0, 99))(attempt)
    try:
        seeded(limits(drawn))()
    except Exception as error:
        if not last:
            raise
        # hypothesis runs the smallest failing example last.
        return {**last, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return None


def _report(console: Console, failure: dict[str, Any]) -> None:
    call = f"check({failure['recipe']!r}, {failure['flat']}, {failure['seed']})"
    console.print(failure["error"], highlight=False, markup=False)
    command = f'python -c "from benchmarks.fuzz.check import check; {call}"'
    console.print(command, highlight=False, markup=False, soft_wrap=True)
