"""Plug-ins of strangers: real distributions on ``sys.path``, broken in every way, beside one that works."""

import os
import subprocess
import sys

import pytest

from widthkit.errors import PluginError
from widthkit.registry import Registry
from widthkit.search.searcher import Searcher
from widthkit.supernet.strategy import Strategy
from widthkit.trace.rules import RULES

STRATEGY = '''
from dataclasses import dataclass
from widthkit_plugins.strategies.ua import UniversallyAligned

@dataclass(frozen=True)
class {name}(UniversallyAligned):
    """A stranger's strategy."""
'''
SEARCHER = '''
from widthkit_plugins.searchers.uniform import UniformSearcher

class {name}(UniformSearcher):
    """A stranger's searcher."""
'''


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a distribution with one module on ``sys.path``, as pip would."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = []

    def add(distribution, code, points, group="widthkit.strategies"):
        module = distribution.replace("-", "_")
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [f"{name} = {module}:{target}" for name, target in points.items()]
        (info / "entry_points.txt").write_text(f"[{group}]\n" + "\n".join(lines) + "\n")

    yield add
    for module in modules:
        sys.modules.pop(module, None)


def strategies():
    return Registry("strategy", "widthkit.strategies", Strategy)


def searchers():
    return Registry("searcher", "widthkit.searchers", Searcher)


def line(registry, name):
    """The one line that asking for a broken plug-in gives."""
    with pytest.raises(PluginError) as caught:
        registry.get(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


BROKEN = {
    "missing dependency": (
        "import no_such_package.part\n",
        "ModuleNotFoundError: No module named 'no_such_package'; install no_such_package, or uninstall the plug-in",
    ),
    "old dependency": ("from numpy import no_such_name\n", "ImportError: cannot import name 'no_such_name'"),
    "syntax": ("def broken(:\n", "SyntaxError"),
    "raises": ("raise RuntimeError('no\\nGPU')\n", "RuntimeError: no GPU"),
    "exits": ("import sys; sys.exit('license expired')\n", "SystemExit: license expired"),
    "no such class": ("x = 1\n", "AttributeError"),
    "a function": ("def Thing(width): pass\n", "it must be a subclass of Strategy"),
    "abstract": (
        "from widthkit.supernet.strategy import Strategy\nclass Thing(Strategy): pass\n",
        "it leaves capacity, combine, cost, paths, train_step undefined",
    ),
    "an argument too few": (
        STRATEGY.format(name="Thing") + "    def paths(self, width): return ()\n",
        "paths(self, width) cannot be called with (width, choices): too many positional arguments",
    ),
    "an argument too many": (
        STRATEGY.format(name="Thing") + "    def combine(self, scores, weights): return 0.0\n",
        "combine(self, scores, weights) cannot be called with (scores): missing a required argument: 'weights'",
    ),
    "not a method": (STRATEGY.format(name="Thing") + "    capacity = 3\n", "its capacity is of type int, not a method"),
}


@pytest.mark.parametrize(("code", "why"), BROKEN.values(), ids=BROKEN)
def test_a_broken_distribution_gives_one_line_with_its_name_and_takes_nobody_down(install, code, why):
    install("careless-plugin", code, {"thing": "Thing"})
    install("good-plugin", STRATEGY.format(name="Fine"), {"fine": "Fine"})
    registry = strategies()
    assert line(registry, "thing").startswith(f"strategy 'thing' of careless-plugin cannot be used: {why}")
    assert {"fine", "ua", "bc"} <= set(registry.names())
    assert registry.get("fine")().n_random == 2
    broken = [info for info in registry.infos() if info.error]
    assert [(info.name, info.distribution) for info in broken] == [("thing", "careless-plugin")]


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (
            "def __init__(self, space): pass",
            "__init__(self, space) cannot be called with (space, budget, rng): too many",
        ),
        ("def __init__(self, space, budget, rng, n): pass", "missing a required argument: 'n'"),
        ("def tell(self, widths): pass", "tell(self, widths) cannot be called with (widths, scores)"),
    ],
)
def test_signatures_of_searchers_are_checked(install, method, why):
    install("bad-searcher", SEARCHER.format(name="Thing") + f"    {method}\n", {"thing": "Thing"}, "widthkit.searchers")
    registry = searchers()
    assert line(registry, "thing").startswith("searcher 'thing' of bad-searcher cannot be used: ")
    assert why in line(registry, "thing")
    assert "greedy" in registry.names()


def test_further_parameters_with_defaults_and_stars_are_fine(install):
    code = SEARCHER.format(name="Thing")
    code += "    def __init__(self, space, budget, rng, n=3, **more): super().__init__(space, budget, rng)\n"
    code += "    def tell(self, *args): super().tell(*args)\n"
    install("good-searcher", code, {"thing": "Thing"}, "widthkit.searchers")
    assert "thing" in searchers().names()


def test_of_two_distributions_with_one_name_the_second_is_refused(install):
    install("alpha", STRATEGY.format(name="A"), {"same": "A"})
    install("beta", STRATEGY.format(name="B"), {"same": "B"})
    registry = strategies()
    assert registry.get("same").__name__ == "A"
    assert [(i.distribution, i.error) for i in registry.infos() if i.error] == [
        ("beta", "strategy 'same' of beta cannot be used: that name is already taken by alpha; rename one of them")
    ]


def test_a_built_in_name_cannot_be_taken_over(install):
    install("zz-usurper", STRATEGY.format(name="Mine"), {"ua": "Mine"})
    registry = strategies()
    assert registry.get("ua").__module__ == "widthkit_plugins.strategies.ua"
    assert next(i.error for i in registry.infos() if i.error).startswith("strategy 'ua' of zz-usurper cannot be used")


def test_a_rule_must_be_callable(install):
    install("odd-rule", "rule = 3\n", {"my_op": "rule"}, "widthkit.rules")
    registry = Registry("rule", "widthkit.rules", None)
    assert line(registry, "my_op") == "rule 'my_op' of odd-rule cannot be used: it is of type int, not a function"


def test_every_built_in_passes_the_checks():
    for registry in (strategies(), searchers(), RULES):
        assert [info for info in registry.infos() if info.error] == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["plugins"], 0),
        (["train", "timm/resnet10t", "--strategy", "thing", "--data", "digits", "--out", "unused"], 2),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else str(value),
)
def test_the_command_line_lists_the_broken_ones_and_names_their_package(install, tmp_path, arguments, code):
    install("careless-plugin", "import no_such_package\n", {"thing": "Thing"})
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "widthkit", *arguments]
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    shown = done.stdout + done.stderr
    assert done.returncode == code, shown
    assert "thing" in shown
    assert "careless-plugin" in shown
    assert "no_such_package" in shown
