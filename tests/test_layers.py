"""Who may import whom: the picture in docs/architecture.md, checked on the syntax trees."""

import ast
import doctest
from pathlib import Path

import pytest

from widthkit.search.score_model import SCORE_MODELS
from widthkit.search.searcher import SEARCHERS
from widthkit.supernet.strategy import STRATEGIES

ROOT = Path(__file__).parent.parent
ORDER = [
    ("errors", "version"),
    ("checked", "files", "registry"),
    ("modules",),
    ("graph",),
    ("trace",),
    ("train",),
    ("supernet",),
    ("latency",),
    ("budget",),
    ("search",),
    ("export",),
    ("run",),
    ("report", "bench", "testing"),
    ("cli",),
]
"""A file imports from its own folder and from the rows above."""
RANK = {name: row for row, names in enumerate(ORDER) for name in names}
DISTRIBUTION = "widthkit"
OTHER_MEANINGS = {
    "trace/rules/pointwise.py": {"random", "uniform"},  # names of PyTorch's operators
    "trace/small_copy.py": {"uniform"},
    "report/run.py": {"uniform"},  # the row of the network that one multiplier gives, as in results.json
    "report/pictures.py": {"uniform"},
    "run/final.py": {"uniform"},
    "train/augment.py": {"random"},  # torchvision's word for noise
    "bench/latency.py": {"uniform"},
    "bench/networks.py": {"uniform"},
}
"""Words that a file uses in another sense than as the name of a plug-in."""


def sources(folder):
    return {p: ast.parse(p.read_text(encoding="utf-8")) for p in sorted((ROOT / folder).rglob("*.py"))}


PACKAGE = sources("widthkit")
PLUGINS = sources("plugins")


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in PACKAGE}


def type_checking_only(tree):
    """Return the ids of nodes that only type checkers see."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
    return {id(node) for block in blocks for node in ast.walk(block)}


def imports(tree, anywhere=True):
    """Yield the modules of widthkit that a file imports; without ``anywhere`` only when it is imported itself."""
    skipped = type_checking_only(tree)
    if not anywhere:
        functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]
        skipped |= {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "widthkit":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "widthkit")


@pytest.mark.parametrize("path", [p for p in PACKAGE if p.parent != ROOT / "widthkit" or p.stem[0] != "_"], ids=str)
def test_imports_go_downwards(path):
    own = path.relative_to(ROOT / "widthkit").parts[0].removesuffix(".py")
    assert own in RANK, f"{own} is in no layer; add it to the table"
    for name in imports(PACKAGE[path]):
        other = name.split(".")[1] if "." in name else name
        assert other != "widthkit", f"{path.name} imports the package's front page"
        if other != own:
            assert RANK[other] < RANK[own], f"{path.name} imports {name} from a higher layer"


def test_no_file_imports_itself_in_a_circle():
    """Also inside a folder; a package's front page counts as a file."""
    edges = {module_name(p): set(imports(tree, anywhere=False)) for p, tree in PACKAGE.items()}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done or name not in edges:
            return
        path.append(name)
        for other in sorted(edges[name]):
            visit(other)
        path.pop()
        done.add(name)

    for name in edges:
        visit(name)


@pytest.mark.parametrize("path", [*PACKAGE, *PLUGINS], ids=str)
def test_what_is_installed_imports_no_benchmark(path):
    """Benchmarks and tests exist in a checkout only."""
    nodes = list(ast.walk({**PACKAGE, **PLUGINS}[path]))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    assert not {name.split(".")[0] for name in names} & {"benchmarks", "tests"}


# --- the core names no plug-in ----------------------------------------------------------------------------------------


def plugin_names():
    """The names of the strategies, searchers and score models of this distribution."""
    infos = [info for registry in (STRATEGIES, SEARCHERS, SCORE_MODELS) for info in registry.infos()]
    return {info.name for info in infos if info.distribution == DISTRIBUTION}


def docstrings(tree):
    """Yield the nodes that document something: a string that stands alone."""
    return [n.value for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Name):
            yield node.id


def named_plugins(tree, names):
    """List where a file names a plug-in: ``line: what``."""
    documents = docstrings(tree)
    texts = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    found = [f"{n.lineno}: {n.value!r}" for n in texts if n.value in names and not any(n is d for d in documents)]
    modules = [*imported(tree), *(n.value for n in texts if not any(n is d for d in documents))]
    found += [name for name in modules if name.split(".")[0] == "widthkit_plugins"]
    for text in (d.value for d in documents if isinstance(d.value, str)):
        for example in doctest.DocTestParser().get_examples(text):
            code = ast.parse(example.source)
            found += [f"doctest: {name}" for name in imported(code) if "widthkit_plugins" in name]
            constants = [n.value for n in ast.walk(code) if isinstance(n, ast.Constant)]
            found += [f"doctest: {value!r}" for value in constants if isinstance(value, str) and value in names]
    return found


def test_names_of_plugins_are_found():
    """The search below sees defaults, comparisons, arguments, imports and examples, and no docstring."""
    names = plugin_names()
    assert {STRATEGIES.default, SEARCHERS.default, SCORE_MODELS.default} <= names
    (name,) = sorted(names)[:1]
    seen = [
        f"DEFAULT = {name!r}",
        f"def f(x={name!r}): pass",
        f"if kind == {name!r}: pass",
        f"f({{'a': [{name!r}]}})",
        "from widthkit_plugins.searchers import x",
        "import widthkit_plugins.strategies as s",
        "def f():\n    import widthkit_plugins",
        "import_module('widthkit_plugins.searchers')",
        'def f():\n    """Do.\n\n    >>> from widthkit_plugins import x\n    """',
    ]
    for code in seen:
        assert named_plugins(ast.parse(code), names), code
    for code in (f"def f():\n    {name!r}", "x = 'other'", "from widthkit.search import search"):
        assert not named_plugins(ast.parse(code), names), code


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_the_package_names_no_plugin(path):
    relative = path.relative_to(ROOT / "widthkit").as_posix()
    found = named_plugins(PACKAGE[path], plugin_names() - OTHER_MEANINGS.get(relative, set()))
    assert found == []


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PACKAGE, *PLUGINS], ids=str)
def test_files_classes_and_functions_fit_on_a_screen(path):
    """At most 300 lines a file, 20 methods a class, 60 lines a function without its docstring."""
    assert path.read_text(encoding="utf-8").count("\n") <= 300
    for node in ast.walk({**PACKAGE, **PLUGINS}[path]):
        if isinstance(node, ast.ClassDef):
            assert sum(isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in node.body) <= 20, node.name
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            documented = (ast.get_docstring(node) or "").count("\n")
            assert node.end_lineno - node.lineno - documented <= 60, node.name
