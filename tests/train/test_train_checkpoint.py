import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from widthkit.errors import CheckpointError
from widthkit.train.checkpoint import load_tree, save_tree


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(same, a, b)) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def round_trip(folder, tree):
    save_tree(folder / "t.safetensors", tree)
    return load_tree(folder / "t.safetensors")


scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
keys = st.text(max_size=4) | st.integers(-9, 9) | st.tuples(st.integers(0, 3), st.text(max_size=2))
tensors = st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
).flatmap(
    lambda d: st.sampled_from([(), (0,), (1,), (2, 3)]).map(
        lambda s: (torch.arange(6)[: math.prod(s)].reshape(s)).to(d)
    )
)
trees = st.recursive(
    scalars | tensors,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(tree=trees)
def test_any_tree_comes_back_with_its_types(tmp_path_factory, tree):
    assert same(round_trip(tmp_path_factory.mktemp("t"), tree), tree)


def test_awkward_tensors(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    parameter = torch.nn.Parameter(base.clone())
    tree = {"t": base.T, "row": base[1], "tied": [parameter, parameter], "base": base, "step": torch.tensor(3.0)}
    back = round_trip(tmp_path, tree)
    assert same({k: tree[k] for k in ("t", "row", "base", "step")}, {k: back[k] for k in ("t", "row", "base", "step")})
    assert back["tied"][0] is back["tied"][1]
    assert torch.equal(back["tied"][0], parameter.detach())
    back["base"].zero_()
    assert torch.equal(back["row"], base[1])


def test_colliding_names_stay_apart(tmp_path):
    tree = {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}, 1: torch.full((1,), 2.0), "1": torch.full((1,), 3.0)}
    assert same(round_trip(tmp_path, tree), tree)


def test_the_state_of_an_optimizer(tmp_path):
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters(), amsgrad=True)
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    back = round_trip(tmp_path, state)
    assert same(state, back)
    optimizer.load_state_dict(back)


@pytest.mark.parametrize("cut", [0, 4, 60, -1])
def test_truncated_files_are_refused(tmp_path, cut):
    file = tmp_path / "a.safetensors"
    save_tree(file, {"w": torch.ones(1000)})
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="damaged") as caught:
        load_tree(file)
    assert "\n" not in str(caught.value)


def test_one_flipped_bit_is_noticed(tmp_path):
    file = tmp_path / "a.safetensors"
    save_tree(file, {"w": torch.ones(1000)})
    data = bytearray(file.read_bytes())
    data[-17] ^= 4
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        load_tree(file)


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_tree(tmp_path / "none")
    save_file({"w": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="not a widthkit checkpoint"):
        load_tree(tmp_path / "other")
    save_file({"w": torch.ones(1)}, tmp_path / "new", {"format": "widthkit-tree", "version": "99"})
    with pytest.raises(CheckpointError, match="version 99"):
        load_tree(tmp_path / "new")
    (tmp_path / "pickle").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(CheckpointError, match="damaged"):
        load_tree(tmp_path / "pickle")


def test_what_has_no_form_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="tree/state/3: a checkpoint cannot hold a set"):
        save_tree(tmp_path / "a", {"state": [1, 2, 3, {4}]})
    with pytest.raises(CheckpointError, match="dense tensors only"):
        save_tree(tmp_path / "a", torch.eye(2).to_sparse())
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    file = tmp_path / "a.safetensors"
    save_tree(file, {"old": torch.ones(2)})
    script = f"""
import resource, signal, torch
from widthkit.errors import CheckpointError
from widthkit.train.checkpoint import save_tree
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_tree({str(file)!r}, {{"new": torch.ones(100000)}})
except CheckpointError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "cannot write checkpoint" in done.stdout
    assert done.stdout.count("\n") == 1
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert torch.equal(load_tree(file)["old"], torch.ones(2))
