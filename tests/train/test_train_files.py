import json
import os

import pytest

from widthkit.errors import OptionError
from widthkit.files import atomic_json, atomic_write


def test_replaces_the_whole_file_and_leaves_nothing_beside_it(tmp_path):
    target = tmp_path / "a" / "b.bin"
    atomic_write(target, b"long old content")
    atomic_write(target, b"new")
    assert target.read_bytes() == b"new"
    assert os.listdir(target.parent) == ["b.bin"]


def test_writes_through_a_link(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_keeps_the_old_file_and_removes_the_temporary_one(tmp_path, monkeypatch, step):
    target = tmp_path / "a"
    atomic_write(target, b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OptionError, match="a: No space left on device"):
        atomic_write(target, b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_path_below_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OptionError) as caught:
        atomic_write(tmp_path / "file" / "x", b"")
    assert "\n" not in str(caught.value)


def test_json_keeps_order_and_has_no_nan(tmp_path):
    target = tmp_path / "a.json"
    atomic_json(target, {"z": 1, "a": (float("inf"), 0.1), "path": tmp_path})
    text = target.read_text()
    assert text.endswith("}\n")
    assert list(json.loads(text)) == ["z", "a", "path"]
    assert json.loads(text, parse_constant=pytest.fail)["a"] == [None, 0.1]
    with pytest.raises(OptionError, match="object has no JSON form"):
        atomic_json(target, {"x": object()})
    assert target.read_text() == text
