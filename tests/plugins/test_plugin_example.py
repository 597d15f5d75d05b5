"""The example package, installed as a stranger would install it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin-strategy"
USE = """
import sys
import torch
import widthkit as wk
from widthkit.cli import main
sys.argv = ["widthkit", "plugins"]
try:
    main()
except SystemExit as stopped:
    assert stopped.code == 0
from widthkit.testing import small_net
net = wk.make_supernet(small_net(), strategy="windows", n_windows=2, example_inputs=(2, 3, 6, 6), k=4)
print(type(net.strategy).__module__)
print(len(net.paths(net.space.smallest)))
slim = wk.export(net, net.space.smallest, path=1)
x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
print(float((net.set_widths(net.space.smallest, 1)(x) - slim(x)).abs().max()) < 1e-12)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A folder with the package in it, put before this environment's packages; the network is not used."""
    folder = tmp_path_factory.mktemp("environment")
    # Building writes beside the sources.
    source = shutil.copytree(EXAMPLE, folder / "source")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*install, "--target", str(folder / "site"), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def run(environment, *arguments):
    paths = [str(environment / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=variables, cwd=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_listed_with_its_package_and_found_by_name(environment):
    *listed, module, paths, same = run(environment, "-c", USE).splitlines()
    assert (module, paths, same) == ("widthkit_windows", "2", "True")
    line = next(line for line in listed if "windows" in line)
    assert line.split()[:2] == ["strategy", "windows"]
    assert line.split()[-1] == "widthkit-windows"
    assert "Random windows of neighbouring channels" in line


def test_it_passes_the_conformance_suite(environment):
    shown = run(environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(environment / "source" / "tests"))
    assert "passed" in shown
    assert "failed" not in shown
    assert "skipped" not in shown


def test_it_is_short():
    lines = (EXAMPLE / "widthkit_windows.py").read_text().splitlines()
    assert len(lines) < 60
