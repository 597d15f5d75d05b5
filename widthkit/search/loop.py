"""Ask, judge, tell. Every judgement is written to the journal before the searcher is told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from widthkit.errors import PluginError
from widthkit.graph import ChannelGraph
from widthkit.search.journal import Journal
from widthkit.search.judging import Judgement
from widthkit.search.result import Trial
from widthkit.search.searcher import Searcher, StandAlone, WidthVector

Judge = Callable[[Sequence[WidthVector]], Iterator[tuple[int, Judgement]]]
"""Yields the place of each width vector in the list, and its judgement, as soon as it is known."""
Watch = Callable[[Trial, float], None]
"""Called with a trial and the share of the search that is done."""


@dataclass
class Loop:
    """Runs searchers.

    Args:
        graph: Prices the width vectors.
        judge: Judges width vectors inside the supernet.
        train: Trains networks on their own, where somebody can.
        journal: Gets every new judgement before anyone else hears of it.
        judged: Judgements of an earlier run, by name in the journal; new ones are added.
        watchers: Called with every trial.
    """

    graph: ChannelGraph
    judge: Judge
    train: Judge | None = None
    journal: Journal = field(default_factory=lambda: Journal(None, ""))
    judged: dict[str, Judgement] = field(default_factory=dict)
    watchers: Sequence[Watch] = ()

    def run(self, searcher: Searcher) -> list[Trial]:
        """Ask, judge what is not known yet, tell, until the searcher is done.

        Returns:
            Every trial inside the supernet, in order.

        Raises:
            PluginError: If the searcher asks for trainings, which it did not announce, and nobody trains.
        """
        trials: list[Trial] = []
        shown = 0
        while not searcher.done:
            asked = searcher.ask()
            if not asked:
                break
            inside = not isinstance(asked, StandAlone)
            if not inside and self.train is None:
                name = type(searcher).__name__
                raise PluginError(f"{name} asks for stand-alone trainings, but its 'trainings' is {searcher.trainings}")
            vectors = [{name: int(width) for name, width in proposal.items()} for proposal in asked]
            shown += inside * (len(vectors) - len({journal_key(widths, inside) for widths in vectors}))  # repeated ones
            for trial in self._judged(vectors, inside):
                shown += inside
                progress = min(1.0, shown / searcher.proposals) if searcher.proposals else searcher.progress
                for watch in self.watchers if inside else ():
                    watch(trial, progress)
            found = [self.judged[journal_key(widths, inside)] for widths in vectors]
            if inside:
                trials += [self.trial(widths, j) for widths, j in zip(vectors, found, strict=True)]
            searcher.tell(asked, [j.score if math.isfinite(j.score) else -math.inf for j in found])
        return trials

    def trial(self, widths: WidthVector, judgement: Judgement) -> Trial:
        """Join widths, judgement and costs."""
        macs, params = self.graph.macs(widths), self.graph.params(widths)
        return Trial(widths, judgement.score, judgement.loss, judgement.accuracy, macs, params, judgement.path)

    def _judged(self, vectors: Sequence[WidthVector], inside: bool) -> Iterator[Trial]:
        """Yield what is known first, then what is judged now, as soon as it is known."""
        keys = [journal_key(widths, inside) for widths in vectors]
        yield from (self.trial(w, self.judged[key]) for key, w in zip(keys, vectors, strict=True) if key in self.judged)
        new = {key: w for key, w in zip(keys, vectors, strict=True) if key not in self.judged}
        judge = self.judge if inside else self.train
        assert judge is not None
        for place, judgement in judge(list(new.values())) if new else ():
            key = list(new)[place]
            self.judged[key] = judgement
            self.journal.add(key, judgement)
            yield self.trial(new[key], judgement)


def journal_key(widths: Mapping[str, int], inside: bool = True) -> str:
    """Name a judgement in the journal: inside the supernet, or of a network that was trained on its own."""
    name = json.dumps(dict(widths), sort_keys=True)
    return name if inside else f"stand-alone {name}"
