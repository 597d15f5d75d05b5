"""Search: the ask/tell contract, the evaluator, results."""

from widthkit.search.result import SearchResult, Trial
from widthkit.search.run import search
from widthkit.search.searcher import SEARCHERS, Searcher

__all__ = ["SEARCHERS", "SearchResult", "Searcher", "Trial", "search"]
