import pytest

from widthkit.search import SEARCHERS


@pytest.fixture
def add_searcher(monkeypatch):
    """Return a function ``(name, class)`` that adds a stranger's searcher for one test."""
    added, get = {}, SEARCHERS.get
    monkeypatch.setattr(SEARCHERS, "get", lambda name: added[name] if name in added else get(name))
    return added.__setitem__
