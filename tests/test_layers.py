"""Who may import whom: the table in docs/architecture.md, checked on the syntax trees."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "widthkit"
LAYERS = [
    {"errors", "version"},
    {"files", "registry", "timing"},
    {"cost", "structure", "clone", "program"},
    {"reparam", "blocks", "memory"},
    {"graph", "expectation"},
    {"plan"},
    {"trace", "narrow"},
    {"models", "space", "latency"},
    {"budget"},
    {"multiplier"},
    {"train"},
    {"borrow", "gates", "strategy", "importance"},
    {"supernet"},
    {"search"},
    {"export"},
    {"blame"},
    {"joint", "stages"},
    {"pipeline"},
    {"report", "bench", "testing"},
    {"cli"},
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def _files():
    return [p for p in sorted(ROOT.rglob("*.py")) if p.name not in ("__init__.py", "__main__.py") or p.parent != ROOT]


def _imports(path):
    """Yield first-level names below widthkit that a file imports, those for type checkers only left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "widthkit":
            parts = node.module.split(".")
            yield from ([parts[1]] if len(parts) > 1 else [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("widthkit."):
                    yield alias.name.split(".")[1]


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert own in RANK, f"{own} is in no layer; add it to the table"
    for name in _imports(path):
        if name != own and name != "widthkit":
            assert RANK[name] < RANK[own], f"{path.name} imports widthkit.{name} from a higher layer"


def test_the_core_knows_no_plugin_by_name():
    for path in _files():
        if path.relative_to(ROOT).parts[0] != "testing":
            assert "widthkit_plugins" not in path.read_text(), path


def test_import_of_the_package_is_free_of_plotting_and_solvers():
    import subprocess
    import sys

    code = "import sys, widthkit; print([m for m in ('matplotlib', 'cvxpy', 'pymoo', 'fvcore') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
