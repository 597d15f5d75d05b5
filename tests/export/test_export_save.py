"""Saved networks come back exactly, and damaged files are refused before anything is built from them."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import widthkit as wk
from widthkit.errors import SlimFileError, WidthsError
from widthkit.export.origin import origin_of
from widthkit.export.schema import from_ranges, to_ranges

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def small():
    torch.manual_seed(0)
    return wk.create_model("timm/resnet10t", num_classes=7).eval()


def halved(model):
    graph = wk.trace(model, (1, 3, 32, 32))
    return wk.export(model, {name: max(1, w // 2) for name, w in graph.full.items()}, graph=graph).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    slim = halved(small())
    path = tmp_path_factory.mktemp("slim") / "slim"
    wk.save(slim, path)
    return slim, path


def test_round_trip_is_bit_identical(saved):
    slim, path = saved
    again = wk.load(path)
    assert type(again) is type(slim)
    assert set(again.state_dict()) == set(slim.state_dict())
    for name, tensor in slim.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(again(X), slim(X))
    assert repr(again) == repr(slim)


def test_no_pickle_and_no_code_in_the_files(saved):
    _, path = saved
    record = json.loads(path.with_name("slim.json").read_text())
    assert record["format"] == 1
    assert record["model"] == {"name": "timm/resnet10t", "kwargs": {"num_classes": 7}}
    weights = path.with_name("slim.safetensors").read_bytes()
    assert b"__reduce__" not in weights
    assert safetensors.torch.load(weights)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("torchvision/mobilenet_v2", {"num_classes": 5}),
        ("torchvision/shufflenet_v2_x0_5", {"num_classes": 5}),
        ("torchvision/densenet121", {}),
        ("timm/efficientnet_b0", {"num_classes": 4, "in_chans": 1}),
        ("timm/regnetx_002", {"num_classes": 4}),
        ("timm/convnext_atto", {"num_classes": 4}),
    ],
)
def test_models_of_the_zoos_are_recognised(tmp_path, name, kwargs):
    model = wk.create_model(name, **kwargs).eval()
    slim = halved_any(model, kwargs.get("in_chans", 3))
    wk.save(slim, tmp_path / "slim")
    x = torch.randn(1, kwargs.get("in_chans", 3), 64, 64)
    assert torch.equal(wk.load(tmp_path / "slim")(x), slim(x))


def halved_any(model, channels):
    graph = wk.trace(model, (1, channels, 64, 64))
    return wk.export(model, {name: max(1, w // 2) for name, w in graph.full.items()}, graph=graph).eval()


def test_export_of_a_supernet_wider_than_the_model_round_trips(tmp_path):
    net = wk.make_supernet(small(), "ua", example_inputs=(1, 3, 32, 32), max_width="1.5x", k=6)
    wide = wk.export(net, net.space.largest).eval()
    assert origin_of(wide).plan.grows
    wk.save(wide, tmp_path / "wide")
    assert torch.equal(wk.load(tmp_path / "wide")(X), wide(X))


def test_slimming_twice_round_trips_from_the_first_dense_model(saved, tmp_path):
    _, path = saved
    once = wk.load(path)
    twice = halved(once)
    assert sum(p.numel() for p in twice.parameters()) < sum(p.numel() for p in once.parameters())
    wk.save(twice, tmp_path / "twice")
    again = wk.load(tmp_path / "twice")
    assert torch.equal(again(X), twice(X))
    assert json.loads((tmp_path / "twice.json").read_text())["model"]["name"] == "timm/resnet10t"


def test_trained_weights_are_what_is_saved(tmp_path):
    slim = halved(small())
    with torch.no_grad():
        for p in slim.parameters():
            p.add_(1)
    wk.save(slim, tmp_path / "slim")
    assert torch.equal(next(wk.load(tmp_path / "slim").parameters()), next(slim.parameters()))


def test_half_precision_round_trips(tmp_path):
    slim = halved(small()).to(torch.bfloat16)
    wk.save(slim, tmp_path / "slim")
    again = wk.load(tmp_path / "slim")
    assert next(again.parameters()).dtype == torch.bfloat16


def own_net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))


def test_own_factories_must_be_allowed(tmp_path):
    slim = wk.export(own_net(), {"0": 3}, example_inputs=(1, 3, 8, 8)).eval()
    with pytest.raises(SlimFileError, match="pass model="):
        wk.save(slim, tmp_path / "slim")
    assert not list(tmp_path.iterdir())
    name = f"{__name__}:own_net"
    wk.save(slim, tmp_path / "slim", model=name)
    with pytest.raises(SlimFileError, match="allow="):
        wk.load(tmp_path / "slim")
    assert torch.equal(wk.load(tmp_path / "slim", allow=[name])(X), slim(X))


def test_a_wrong_name_is_refused(tmp_path):
    slim = halved(small())
    with pytest.raises(SlimFileError, match="does not rebuild"):
        wk.save(slim, tmp_path / "slim", model="timm/resnet18", kwargs={"num_classes": 7})
    assert not list(tmp_path.iterdir())


def test_plain_models_are_refused(tmp_path):
    with pytest.raises(SlimFileError, match="not made by"):
        wk.save(small(), tmp_path / "slim")


def edit(path, change):
    record = json.loads(path.with_name("slim.json").read_text())
    change(record)
    return json.dumps(record).encode()


DAMAGE = {
    "not json": lambda r: None,
    "another version": lambda r: r.update(format=2),
    "a missing key": lambda r: r.pop("plan"),
    "an extra key": lambda r: r.update(code="import os"),
    "another model": lambda r: r["model"].update(name="timm/resnet18"),
    "an unknown model": lambda r: r["model"].update(name="timm/resnet10tt"),
    "an index out of range": lambda r: r["plan"]["tensors"]["layer1.0.conv1.weight"].update({"0": [[0, 10**6]]}),
    "a huge growth": lambda r: r["plan"]["tensors"]["layer1.0.conv1.weight"].update({"0": [[-1, 10**9]]}),
    "a dim too many": lambda r: r["plan"]["tensors"]["layer1.0.conv1.weight"].update({"7": [[0, 1]]}),
    "an unknown tensor": lambda r: r["plan"]["tensors"].update({"nowhere": {"0": [[0, 1]]}}),
    "an unknown attribute": lambda r: r["plan"]["attributes"].append(
        {"module": "layer1", "name": "forwardx", "element": None, "value": 3}
    ),
    "a changed attribute": lambda r: r["plan"]["attributes"][0].update(value=999),
    "changed kept channels": lambda r: r["plan"]["tensors"]["layer1.0.conv1.weight"].update({"0": [[0, 5]]}),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_recipes_are_refused_in_one_line(saved, tmp_path, kind):
    _, path = saved
    (tmp_path / "slim.safetensors").write_bytes(path.with_name("slim.safetensors").read_bytes())
    data = b"{" if kind == "not json" else edit(path, DAMAGE[kind])
    (tmp_path / "slim.json").write_bytes(data)
    with pytest.raises(SlimFileError) as caught:
        wk.load(tmp_path / "slim")
    assert "\n" not in str(caught.value)


def test_damaged_or_missing_weights_are_refused(saved, tmp_path):
    _, path = saved
    (tmp_path / "slim.json").write_bytes(path.with_name("slim.json").read_bytes())
    with pytest.raises(SlimFileError, match="cannot be read"):
        wk.load(tmp_path / "slim")
    data = bytearray(path.with_name("slim.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "slim.safetensors").write_bytes(bytes(data))
    with pytest.raises(SlimFileError, match="checksum"):
        wk.load(tmp_path / "slim")


def test_index_ranges_round_trip_on_random_indices():
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = int(rng.integers(1, 40))
        index = np.sort(rng.choice(size, size=int(rng.integers(1, size + 1)), replace=False))
        at = int(rng.integers(0, len(index) + 1))
        index = np.insert(index, at, [-1] * int(rng.integers(0, 4)))
        ranges = [list(pair) for pair in to_ranges(index)]
        assert from_ranges(ranges, size, "t").tolist() == index.tolist()


def test_refused_widths_leave_the_model_as_it_is():
    model = small()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    for widths in ({"nope": 3}, {"layer1.0.conv1": 0}, {"layer1.0.conv1": "3"}, {"layer1.0.conv1": [0, 0]}):
        with pytest.raises(WidthsError):
            wk.export(model, widths, example_inputs=(1, 3, 32, 32))
    assert flags == [m.training for m in model.modules()]
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_explicit_units_are_the_ones_that_are_kept():
    model = small()
    slim = wk.export(model, {"layer1.0.conv1": [1, 5, 9]}, example_inputs=(1, 3, 32, 32))
    kept = model.layer1[0].conv1.weight[[1, 5, 9]]
    assert torch.equal(slim.layer1[0].conv1.weight, kept)
