"""Search: the ask/tell contract, judging, results."""

from widthkit.search.judging import Judging
from widthkit.search.resources import check_searcher
from widthkit.search.result import SearchResult, Trial
from widthkit.search.run import search
from widthkit.search.searcher import SEARCHERS, OneShotSearcher, Searcher, StandAlone

__all__ = [
    "SEARCHERS",
    "Judging",
    "OneShotSearcher",
    "SearchResult",
    "Searcher",
    "StandAlone",
    "Trial",
    "check_searcher",
    "search",
]
