"""Who may import whom: the picture in docs/architecture.md, checked on the syntax trees."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [
    ("errors", "version"),
    ("files", "registry"),
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
PLUGIN_NAMES = ["strategies", "searchers", "score_models"]


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
