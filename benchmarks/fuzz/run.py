"""Draw networks and widths, run the oracles, and shrink what fails to the smallest network that still does."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from benchmarks.fuzz.nets import LEAVES, NESTS, RandomNet, Recipe
from benchmarks.fuzz.tokens import Named
from benchmarks.oracles import cut
from benchmarks.oracles.checks import (
    TOLERANCE,
    CheckError,
    check_same_net,
    counted_macs,
    n_params,
    outputs,
    permuted,
    random_units,
    same,
)
from widthkit.bench.files import write
from widthkit.errors import OptionError
from widthkit.export.dense import export
from widthkit.trace import trace

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

_CHUNK = 250


def check(recipe: list[Recipe], flat: bool = False, seed: int = 0) -> None:
    """Hold one network against all oracles, at random widths, in float64.

    Args:
        recipe: The blocks between stem and head.
        flat: Whether the head reads the flattened map.
        seed: Of the weights, units and widths.

    Raises:
        CheckError: If an oracle does not hold.

    >>> check([("residual", (("se", (2,)), ("conv", (3,))))])
    """
    model, x = _model(recipe, flat, seed)
    graph = trace(model, x)
    if not graph.group_names:
        return
    rng = np.random.default_rng(seed)
    inputs = (x,)
    same(outputs(permuted(model, graph, rng), inputs), outputs(model, inputs))
    units = random_units(graph, rng, least=0)
    slim, widths = export(model, units, graph=graph), {n: len(u) for n, u in units.items()}
    counted = counted_macs(slim, inputs), n_params(slim)
    if _multiplies_by_element(slim):
        counted = graph.macs(widths), counted[1]
    if counted != (graph.macs(widths), graph.params(widths)):
        raise CheckError(f"{graph.macs(widths), graph.params(widths)} MACs and parameters foretold, {counted} counted")
    if not cut.why_not(model, inputs):
        cut.check_cut(model, graph, inputs, units, TOLERANCE)
    check_same_net(model, graph, inputs, rng)


def _multiplies_by_element(model: nn.Module) -> bool:
    """Whether ``torch.einsum`` multiplies element by element, over a dim of size 1, which no counter counts."""
    return any(1 in m.matrix.shape for m in model.modules() if isinstance(m, Named))


def _model(recipe: list[Recipe], flat: bool, seed: int) -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RandomNet(recipe, flat).double().eval()
        for _, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.ndim <= 1 and tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.5, 1.5)
        return model, torch.randn(1, 3, 6, 6, dtype=torch.float64)


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
    """Check many networks, print every failure as a command that repeats it, and return how many there were."""
    try:
        import hypothesis
        from hypothesis import strategies as st
    except ImportError as error:
        raise OptionError("bench fuzz needs hypothesis; install it with: pip install 'widthkit[test]'") from error
    torch.set_num_threads(1)
    seed = secrets.randbelow(2**31) if seed is None else seed
    console = Console()
    console.print(f"seed {seed}; the same seed draws the same networks", highlight=False)
    failures: list[dict[str, Any]] = []
    last: dict[str, Any] = {}

    def attempt(recipe: list[Recipe], flat: bool, widths: int) -> None:
        last.update(recipe=recipe, flat=flat, seed=widths)
        check(recipe, flat, widths)

    for start in range(0, examples, _CHUNK):
        drawn = hypothesis.given(recipe=recipes(), flat=st.booleans(), widths=st.integers(0, 99))(attempt)
        limits = hypothesis.settings(
            max_examples=min(_CHUNK, examples - start),
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        try:
            hypothesis.seed(seed + start)(limits(drawn))()
        except Exception as error:
            if not last:
                raise
            # hypothesis runs the smallest failing example last.
            failures.append({**last, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
            _report(console, failures[-1])
        console.print(f"{min(start + _CHUNK, examples)}/{examples}: {len(failures)} failures", highlight=False)
    write(out, "fuzz", failures, examples=examples, seed=seed)
    return len(failures)


def _report(console: Console, failure: dict[str, Any]) -> None:
    call = f"check({failure['recipe']!r}, {failure['flat']}, {failure['seed']})"
    console.print(failure["error"], highlight=False, markup=False)
    command = f'python -c "from benchmarks.fuzz.run import check; {call}"'
    console.print(command, highlight=False, markup=False, soft_wrap=True)
