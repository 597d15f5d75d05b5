"""Shrink and run again: does what the trace says hold for the smaller model?

The first run cannot see sizes that live in Python (``self.num_heads``, split sizes). So a shrunk copy is run, with
the labels of the first run on its tensors. Every tie of the second run must join labels that the first run had joined
already, and every result must have the size that the first run foretells. For a misfit the probe tries integer
attributes of the module that ran the call (they may count kept channels), then the other alternatives of its shape
demands, and freezes what nothing mends.
"""

from __future__ import annotations

from collections.abc import Callable

from widthkit.errors import Option, TraceError
from widthkit.graph import ChannelGraph, ChannelGroup
from widthkit.trace.candidate import TURNS, Draft, Misfit, check
from widthkit.trace.components import Components
from widthkit.trace.labels import Labels
from widthkit.trace.repair import mend


def probe(draft: Draft, *, limit: int = 400) -> ChannelGraph:
    """Return a graph whose shrunk model runs and agrees with the trace.

    Args:
        draft: The traced run.
        limit: How many misfits to work on before giving up.

    Raises:
        TraceError: If no set of frozen groups makes the shrunk model run.
    """
    misfit = None
    for _ in range(limit):
        graph, solved = draft.build()
        found = _first_misfit(draft, graph, solved)
        if found is None:
            return graph
        turn, misfit = found
        if not graph.group_names:
            break
        if not mend(draft, misfit, turn):
            _freeze(draft, graph, solved, misfit, turn)
    assert misfit is not None
    raise TraceError(
        f"{misfit.path or 'model'}: the shrunk model never ran ({misfit.why}); name the part in ", Option("freeze")
    )


def _first_misfit(draft: Draft, graph: ChannelGraph, solved: Components) -> tuple[int, Misfit] | None:
    for turn in range(TURNS):
        misfit = check(draft, graph, solved, graph.group_names, turn)
        if misfit is not None:
            return turn, misfit
    return None


def _freeze(draft: Draft, graph: ChannelGraph, solved: Components, misfit: Misfit, turn: int) -> None:
    """Freeze the fewest groups that take the misfit away, the suspects of the failing module first."""
    what = misfit.why if misfit.components else f"the shrunk model does not run ({misfit.why})"
    everything = list(graph.group_names)

    def gone(names: set[str]) -> bool:
        now = check(draft, graph, solved, [n for n in everything if n not in names], turn)
        return now is None or now.progress > misfit.progress

    suspects = _suspects(draft, graph, solved, misfit) or everything
    if not gone(set(suspects)):
        suspects = everything
    for name in _minimal(suspects, gone):
        for labels in _labels_of(draft, graph.groups[name]):
            draft.run.store.freeze(labels, f"{misfit.path or 'model'}: {what}")


def _minimal(suspects: list[str], gone: Callable[[set[str]], bool]) -> list[str]:
    """Drop suspects, in halves first and then one by one, as long as the misfit stays away."""
    needed = list(suspects)
    step = len(needed) // 2
    while step >= 1:
        start = 0
        while start < len(needed) and len(needed) > 1:
            rest = needed[:start] + needed[start + step :]
            if rest and gone(set(rest)):
                needed = rest
            else:
                start += step
        step //= 2
    return needed


def _suspects(draft: Draft, graph: ChannelGraph, solved: Components, misfit: Misfit) -> list[str]:
    """List the groups whose units pass through the module that failed, or that met wrongly."""
    components = set(misfit.components)
    if not components:
        for labels in draft.run.seen.get(misfit.path, []):
            components.update(solved.unit[labels].tolist())
    return [
        name
        for name, group in graph.groups.items()
        if components.intersection(solved.unit[_labels_of(draft, group)[0]].tolist())
    ]


def _labels_of(draft: Draft, group: ChannelGroup) -> list[Labels]:
    """Return the labels of a group's units, at every site."""
    found = []
    for site in group.sites:
        labels = draft.seeds.labels[site.tensor][site.dim]
        assert labels is not None
        found.append(labels[site.index[:, 0]])
    return found
