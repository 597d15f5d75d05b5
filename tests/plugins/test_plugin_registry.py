"""One strict registry: what a broken plug-in says, and that it takes nobody down."""

import re
from abc import ABC, abstractmethod
from types import SimpleNamespace

import pytest

import widthkit.registry
from widthkit.errors import OptionError, PluginError
from widthkit.registry import PluginInfo, Registry
from widthkit.supernet.strategy import make_strategy


class Base(ABC):
    @abstractmethod
    def do(self):
        """Do it."""

    @abstractmethod
    def undo(self):
        """Undo it."""


class Good(Base):
    """A good one.

    With more to say.
    """

    def do(self):
        return 1

    def undo(self):
        return 0


class Other(Good):
    """Another."""


class Silent(Base):
    def do(self):
        return 1

    def undo(self):
        return 0


class Unfinished(Base):
    def do(self):
        return 1


def entry(name, found, distribution="stranger"):
    """An entry point; ``found`` is what it loads, or the exception that loading it raises."""

    def load():
        if isinstance(found, Exception):
            raise found
        return found

    dist = SimpleNamespace(name=distribution) if distribution else None
    return SimpleNamespace(name=name, load=load, dist=dist)


@pytest.fixture
def make(monkeypatch):
    """Make a registry that finds certain entry points."""

    def build(*points, base=Base):
        def entry_points(*, group):
            assert group == "widthkit.tests"
            return list(points)

        monkeypatch.setattr(widthkit.registry, "entry_points", entry_points)
        return Registry("gadget", "widthkit.tests", base)

    return build


def message(registry, name):
    with pytest.raises(PluginError) as caught:
        registry.get(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_entry_points_are_found_and_described(make):
    registry = make(entry("zed", Silent), entry("good", Good, None))
    assert registry.names() == ["good", "zed"]
    assert registry.get("good") is Good
    assert list(registry.infos()) == [
        PluginInfo("gadget", "good", "A good one.", "?"),
        PluginInfo("gadget", "zed", "(no description)", "stranger"),
    ]


BROKEN = {
    "import error": (ImportError("No module named 'torchx'"), "ImportError: No module named 'torchx'"),
    "syntax error": (SyntaxError("invalid\nsyntax"), "SyntaxError: invalid syntax"),
    "attribute error": (AttributeError("module has no attribute 'Thing'"), "AttributeError: module has no attribute"),
    "wrong base": (dict, "it must be a subclass of Base"),
    "not a class": (lambda: None, "it must be a subclass of Base"),
    "an instance": (Good(), "it must be a subclass of Base"),
    "abstract": (Unfinished, "it leaves undo undefined"),
}


@pytest.mark.parametrize(("found", "why"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_is_named_with_its_package_and_the_others_work(make, found, why):
    registry = make(entry("bad", found, "careless"), entry("good", Good))
    assert registry.names() == ["good"]
    assert registry.get("good") is Good
    assert message(registry, "bad").startswith(f"gadget 'bad' of careless cannot be used: {why}")
    assert message(registry, "bad").count("careless") == 1
    broken = [info for info in registry.infos() if info.error]
    assert [(info.name, info.distribution, info.error) for info in broken] == [
        ("bad", "careless", message(registry, "bad"))
    ]


@pytest.mark.parametrize("flip", [False, True])
def test_of_two_plugins_with_one_name_the_first_package_wins_whatever_the_order(make, flip):
    points = [entry("good", Good, "alpha"), entry("good", Other, "beta")]
    registry = make(*(reversed(points) if flip else points))
    assert registry.get("good") is Good
    good, refused = registry.infos()
    assert (good.distribution, good.error) == ("alpha", None)
    assert refused.distribution == "beta"
    assert refused.error == (
        "gadget 'good' of beta cannot be used: that name is already taken by alpha; rename one of them"
    )


def test_a_broken_plugin_does_not_hide_a_working_one_of_the_same_name(make):
    registry = make(entry("good", ImportError("gone"), "alpha"), entry("good", Good, "beta"))
    assert registry.get("good") is Good
    assert [(info.distribution, bool(info.error)) for info in registry.infos()] == [("beta", False), ("alpha", True)]


def test_two_broken_plugins_of_one_name_are_both_named(make):
    registry = make(entry("bad", ImportError("gone"), "alpha"), entry("bad", dict, "beta"))
    assert "of alpha cannot" in message(registry, "bad")
    assert "of beta cannot" in message(registry, "bad")


def test_the_same_class_twice_is_no_conflict(make):
    registry = make(entry("good", Good))
    assert registry.register("good")(Good) is Good
    assert next(registry.infos()).distribution == "stranger"


def test_unknown_names_list_what_is_close(make):
    registry = make(entry("good", Good), entry("other", Other))
    assert message(registry, "goood") == "unknown gadget 'goood': did you mean good?"
    assert message(registry, "zzz") == "unknown gadget 'zzz': known: good, other"
    assert message(make(), "zzz") == "unknown gadget 'zzz': none is installed"


def test_the_decorator_registers_and_refuses(make):
    registry = make(entry("good", Good))

    @registry.register("mine")
    class Mine(Good):
        """Mine."""

    assert registry.get("mine") is Mine
    assert registry.names() == ["good", "mine"]
    with pytest.raises(PluginError, match="already taken by stranger"):
        registry.register("good")(Mine)
    with pytest.raises(PluginError, match=r"already taken by .*test_plugin_registry"):
        registry.register("mine")(Other)
    with pytest.raises(PluginError, match="leaves undo undefined"):
        registry.register("half")(Unfinished)
    with pytest.raises(PluginError, match="must be a subclass of Base"):
        registry.register("function")(lambda: None)
    assert registry.names() == ["good", "mine"]


def test_a_plugin_may_register_itself_while_it_is_loaded(make):
    point = entry("good", Good)
    registry = make(point)
    point.load = lambda: registry.register("good")(Good)
    assert registry.names() == ["good"]


def test_entry_points_are_looked_up_once(make, monkeypatch):
    registry = make(entry("good", Good))
    registry.names()
    monkeypatch.setattr(widthkit.registry, "entry_points", lambda **_: pytest.fail("looked up again"))
    registry.get("good")
    assert len(list(registry.infos())) == 1


def test_functions_are_plugins_where_no_base_is_asked_for(make):
    registry = make(entry("twice", lambda x: 2 * x), base=None)
    assert registry.get("twice")(4) == 8


def test_the_built_in_plugins_come_in_through_the_same_door():
    from widthkit.search import SEARCHERS
    from widthkit.supernet.strategy import STRATEGIES

    assert {"ua", "bc"} <= set(STRATEGIES.names())
    assert {"greedy", "random", "uniform"} <= set(SEARCHERS.names())
    for registry in (STRATEGIES, SEARCHERS):
        for info in registry.infos():
            assert info.error is None
            assert info.summary.endswith((".", ")."))
            assert info.distribution == "widthkit"
    assert all(cls.__module__.startswith("widthkit_plugins.") for cls in map(STRATEGIES.get, STRATEGIES.names()))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"complementary": 3}, "complementary must be true or false, not 3"),
        ({"complement": True}, "complement must be text, not True"),
        ({"pairing": True}, "has no option 'pairing'; its options are: "),
    ],
)
def test_options_of_a_strategy_are_checked_by_name_and_type(options, line):
    with pytest.raises(OptionError, match=re.escape(line)):
        make_strategy("bc", options)
