"""Shrink the model, run it again, and check that it agrees with the trace.

Some sizes live in Python (``self.num_heads``, split sizes), where the first run cannot see them all. So a shrunk copy
is run with the labels of the first run on its tensors. Its ties must join only labels that are joined already, and
every result must have the expected size. At a mismatch the probe lets integer attributes of the failing module follow
channels, then tries the other alternatives of its shape demands, and freezes groups where neither helps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from widthkit.errors import Option, TraceError
from widthkit.graph import ChannelGraph, ChannelGroup
from widthkit.trace.candidate import N_SHRUNK_COPIES, Candidate, Mismatch, check
from widthkit.trace.claims import Claims
from widthkit.trace.components import Components
from widthkit.trace.labels import Labels
from widthkit.trace.permutation import Verdict, check_permutation
from widthkit.trace.repair import repair


def probe(candidate: Candidate, *, max_mismatches: int = 400) -> ChannelGraph:
    """Return a graph whose shrunk model runs and agrees with the trace.

    Args:
        candidate: The first run.
        max_mismatches: How many mismatches to work on before giving up.

    Raises:
        TraceError: If the shrunk model does not run whatever is frozen.
    """
    mismatch = None
    harmless: set[int] = set()
    for _ in range(max_mismatches):
        graph, solved = candidate.build()
        found = _first_mismatch(candidate, graph, solved)
        if found is None:
            found = _failing_claim(candidate, graph, solved, harmless)
        if found is None:
            verdict = check_permutation(candidate, graph)
            if not verdict.wrong:
                return _noted(graph, verdict)
            _freeze_groups(candidate, graph, verdict.wrong)
            continue
        copy_index, mismatch = found
        if not graph.group_names:
            break
        if not repair(candidate, mismatch, copy_index):
            _freeze(candidate, graph, solved, mismatch, copy_index)
    assert mismatch is not None, "permutations freeze a group each time"
    raise TraceError(
        f"{mismatch.path or 'model'}: no shrunk copy of the model runs ({mismatch.why}); name "
        f"'{mismatch.path or '*'}' in ",
        Option("freeze"),
    )


def _first_mismatch(candidate: Candidate, graph: ChannelGraph, solved: Components) -> tuple[int, Mismatch] | None:
    """Return the first shrunk copy that disagrees with the first run, and how."""
    for copy_index in range(N_SHRUNK_COPIES):
        mismatch = check(candidate, graph, solved, graph.group_names, copy_index)
        if mismatch is not None:
            return copy_index, mismatch
    return None


def _failing_claim(
    candidate: Candidate, graph: ChannelGraph, solved: Components, harmless: set[int]
) -> tuple[int, Mismatch] | None:
    """Look for widths at which Python computes or decides something else, and run a copy of these widths.

    Args:
        candidate: The first run.
        graph: A graph that all shrunk copies agree with.
        solved: Its components.
        harmless: Numbers of claims that may fail, since the model runs there as expected; extended in place.
    """
    if not graph.group_names:
        return None
    claims = Claims(candidate.recording, candidate.attribute_records(), graph, solved, candidate.units())
    while True:
        found = claims.witness(harmless)
        if found is None:
            return None
        candidate.witness, number = found
        mismatch = check(candidate, graph, solved, graph.group_names, N_SHRUNK_COPIES)
        if mismatch is not None:
            return N_SHRUNK_COPIES, mismatch
        harmless.add(number)


def _freeze(candidate: Candidate, graph: ChannelGraph, solved: Components, mismatch: Mismatch, copy_index: int) -> None:
    """Freeze the fewest groups that remove the mismatch; groups of the failing module are tried first."""
    what = f"the shrunk model does not run ({mismatch.why})" if mismatch.raised else mismatch.why
    all_groups = list(graph.group_names)

    def removes_mismatch(frozen: set[str]) -> bool:
        now = check(candidate, graph, solved, [n for n in all_groups if n not in frozen], copy_index)
        return now is None or now.progress > mismatch.progress

    suspects = _suspects(candidate, graph, solved, mismatch) or all_groups
    if not removes_mismatch(set(suspects)):
        suspects = all_groups
    for name in _minimal(suspects, removes_mismatch):
        for labels in _labels_of(candidate, graph.groups[name]):
            candidate.recording.store.freeze(labels, f"{mismatch.path or 'model'}: {what}")


def _freeze_groups(candidate: Candidate, graph: ChannelGraph, names: Iterable[str]) -> None:
    """Freeze groups whose units are not interchangeable."""
    for name in names:
        for labels in _labels_of(candidate, graph.groups[name]):
            candidate.recording.store.freeze(
                labels, f"{name}: the outputs change when two of its channels are exchanged"
            )


def _noted(graph: ChannelGraph, verdict: Verdict) -> ChannelGraph:
    """Say so where the groups could not be checked by permuting them."""
    if not verdict.unknown:
        return graph
    note = f"the groups were not checked by exchanging channels: {verdict.unknown}"
    return replace(graph, notes=(*graph.notes, note))


def _minimal(suspects: list[str], suffices: Callable[[set[str]], bool]) -> list[str]:
    """Leave out suspects, half of them first and then ever fewer, as long as the rest suffices."""
    needed = list(suspects)
    step = len(needed) // 2
    while step >= 1:
        start = 0
        while start < len(needed) and len(needed) > 1:
            rest = needed[:start] + needed[start + step :]
            if rest and suffices(set(rest)):
                needed = rest
            else:
                start += step
        step //= 2
    return needed


def _suspects(candidate: Candidate, graph: ChannelGraph, solved: Components, mismatch: Mismatch) -> list[str]:
    """List the groups that are wrongly tied, or else those that the failing module saw."""
    components = set(mismatch.components)
    if not components:
        for labels in candidate.recording.seen.get(mismatch.path, []):
            components.update(solved.unit[labels].tolist())
    return [
        name
        for name, group in graph.groups.items()
        if components.intersection(solved.unit[_labels_of(candidate, group)[0]].tolist())
    ]


def _labels_of(candidate: Candidate, group: ChannelGroup) -> list[Labels]:
    """Return the labels of a group's units, at every site."""
    found = []
    for site in group.sites:
        labels = candidate.tensor_labels[site.tensor][site.dim]
        assert labels is not None
        found.append(labels[site.index[:, 0]])
    return found
