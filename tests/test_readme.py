"""The README's Python snippet runs as it stands."""

import re
from pathlib import Path

import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_snippet_runs_and_its_result_loads(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    x = torch.randn(2, 3, 32, 32)
    slim, again, graph = names["slim"], names["again"], names["graph"]
    assert type(slim) is type(names["model"])
    assert torch.equal(slim.eval()(x), again(x))
    assert graph.macs(names["result"].widths) <= 0.5 * graph.macs()


def test_files_the_readme_links_to_exist():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (Path(__file__).parent.parent / link).exists(), link
