"""A thousand damaged files: each is refused in one line or loads equal, and none allocates more than it justifies."""

import hashlib
import json
import random
import resource
import tracemalloc

import pytest
import torch
from torch import nn

import widthkit as wk
from widthkit.errors import WidthkitError
from widthkit.export.schema import checksum

X = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
HUGE = [0, -1, 2**31, 2**40, 10**12, 2**63, 10**30, 1e308, 1e-9, True, None, "", "x" * 100, [], {}, [[0, 10**12]]]


def tiny(width=16, classes=4, blocks=2):
    """A factory that makes what a file asks for; small, for a thousand loads."""
    layers = [nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(blocks):
        layers += [nn.Conv2d(width, width, 3, groups=2), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


TINY = f"{__name__}:tiny"


def write(dense, path, **options):
    torch.manual_seed(0)
    graph = wk.trace(dense, (1, 3, 32, 32))
    slim = wk.export(dense, {g: max(2, w // 4) for g, w in graph.full.items()}, graph=graph).eval()
    weights, recipe = wk.save(slim, path, **options)
    return slim, weights.read_bytes(), recipe.read_bytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A network of timm's, whose factory takes many arguments."""
    model = wk.create_model("timm/resnet10t", num_classes=7)
    return write(model, tmp_path_factory.mktemp("fuzz") / "slim")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    kwargs = {"width": 16, "classes": 4, "blocks": 2}
    return write(tiny(**kwargs), tmp_path_factory.mktemp("fuzz") / "slim", model=TINY, kwargs=kwargs)


def flip(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def cut(data, rng):
    start = rng.randrange(len(data))
    return data[:start] if rng.random() < 0.5 else data[:start] + data[start + rng.randrange(1, 400) :]


def leaves(value, path=()):
    if isinstance(value, (dict, list)) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path


def put(record, path, value):
    for key in path[:-1]:
        record = record[key]
    record[path[-1]] = value


def get(record, path):
    for key in path:
        record = record[key]
    return record


def forged(recipe, rng):
    """Change a value or swap two, and repair the checksum: what an attacker would send."""
    record = json.loads(recipe)
    paths = list(leaves({k: v for k, v in record.items() if k != "sha256"}))
    shapes = [p for p in paths if p[:2] == ("plan", "shapes")]
    for _ in range(rng.choice([1, 1, 3])):
        # Most leaves are shapes; the others deserve as much attention.
        one, two = (rng.choice(shapes if rng.random() < 0.3 else [p for p in paths if p not in shapes]) for _ in "ab")
        if rng.random() < 0.5:
            put(record, one, rng.choice(HUGE))
        else:
            a, b = get(record, one), get(record, two)
            put(record, one, b)
            put(record, two, a)
    if rng.random() < 0.1:
        record["model"]["kwargs"][rng.choice(["width", "classes", "blocks"])] = rng.choice(HUGE)
    record["sha256"] = checksum(record)
    return json.dumps(record).encode()


def reheaded(weights, recipe, rng):
    """Damage the safetensors header (or its length) and repair all checksums."""
    size = int.from_bytes(weights[:8], "little")
    header, rest = weights[8 : 8 + size], weights[8 + size :]
    kind = rng.randrange(3)
    if kind == 0:
        length = rng.choice([0, size + 1, len(weights), 2**40, 2**63 - 1, 2**64 - 1])
        damaged = length.to_bytes(8, "little") + header + rest
    elif kind == 1:
        text = header.decode()
        digits = [i for i, c in enumerate(text) if c.isdigit()]
        i = rng.choice(digits)
        text = text[:i] + str(rng.choice([0, 7, 99999, 10**12])) + text[i + 1 :]
        damaged = len(text).to_bytes(8, "little") + text.encode() + rest
    else:
        text = header.decode().replace("F32", rng.choice(["F16", "I64", "BOOL", "F64", "I32"]), rng.choice([1, -1]))
        damaged = len(text).to_bytes(8, "little") + text.encode() + rest
    record = json.loads(recipe)
    record["weights_sha256"] = hashlib.sha256(damaged).hexdigest()
    record["sha256"] = checksum(record)
    return damaged, json.dumps(record).encode()


def damaged(saved, rng):
    _, weights, recipe = saved
    kind = rng.randrange(8)
    if kind < 2:
        return weights, (flip, cut)[kind](recipe, rng)
    if kind < 4:
        return (flip, cut)[kind - 2](weights, rng), recipe
    if kind == 4:
        return reheaded(weights, recipe, rng)
    return weights, forged(recipe, rng)


def test_a_thousand_damaged_files(small, tmp_path):
    slim, weights, recipe = small
    rng = random.Random(0)
    expected = slim(X)
    refused = equal = 0
    lines = set()
    (tmp_path / "s.safetensors").write_bytes(weights)
    (tmp_path / "s.json").write_bytes(recipe)
    wk.load(tmp_path / "s", allow=[TINY])  # what is imported and cached by a first load is not the files' doing
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        for number in range(1000):
            one, two = damaged(small, rng)
            (tmp_path / "s.safetensors").write_bytes(one)
            (tmp_path / "s.json").write_bytes(two)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                again = wk.load(tmp_path / "s", allow=[TINY])
            except WidthkitError as error:
                refused += 1
                lines.add(str(error).count("\n"))
            else:
                equal += 1
                # Damage that still loads (a count for people, a value put back) must not change the network.
                assert {n: t.shape for n, t in again.state_dict().items()} == {
                    n: t.shape for n, t in slim.state_dict().items()
                }
                assert torch.equal(again(X), expected), number
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < 20 * (len(one) + len(two)) + 2**24, number
    finally:
        tracemalloc.stop()
    # Tensors are not Python's memory; the whole process may not have grown by more than some files' worth.
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident)
    assert grown < 64 * 2**20 + 20 * len(weights)
    assert lines == {0}
    assert refused > 700
    assert refused + equal == 1000


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": 7, "checkpoint_path": "/tmp/evil.pth"}, "may not make a factory fetch"),
        ({"num_classes": 7, "pretrained": True}, "may not make a factory fetch"),
        ({"num_classes": 7, "name": "timm/resnet18"}, "cannot be built"),
        ({"num_classes": 10**12}, "the plan does not fit|another structure|cannot be built"),
        ({"num_classes": 7, "layers": [10**7, 1, 1, 1]}, "more than .* parameters"),
    ],
)
def test_factories_cannot_be_made_to_fetch_or_to_grow(saved, tmp_path, kwargs, message):
    _, weights, recipe = saved
    record = json.loads(recipe)
    record["model"]["kwargs"] = kwargs
    record["sha256"] = checksum(record)
    (tmp_path / "s.safetensors").write_bytes(weights)
    (tmp_path / "s.json").write_text(json.dumps(record))
    with pytest.raises(WidthkitError, match=message):
        wk.load(tmp_path / "s")


def test_a_consistent_forgery_of_a_huge_dense_model_allocates_nothing_huge(tmp_path):
    """Every number in the file agrees; the dense model would take 860 MB, the slim one is small."""
    torch.manual_seed(0)
    name = "torchvision/resnet18"
    with torch.device("meta"):
        dense = wk.create_model(name, num_classes=400_000)
    graph = wk.trace(dense, (1, 3, 32, 32), free_outputs=True)
    small = {g: max(1, w // 16) for g, w in graph.full.items()} | {"fc": 3}
    slim = wk.export(dense, small, graph=graph)
    slim.to_empty(device="cpu")
    for tensor in slim.state_dict().values():
        tensor.zero_()
    wk.save(slim, tmp_path / "s", model=name, kwargs={"num_classes": 400_000})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    again = wk.load(tmp_path / "s")
    assert again.fc.out_features == 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 2**10  # KiB


def test_shared_tensors_stay_shared_and_gradients_stay_off(tmp_path):
    slim = wk.export(tied(), {"a": 3}, example_inputs=(1, 3, 8, 8)).eval()
    wk.save(slim, tmp_path / "s", model=f"{__name__}:tied")
    again = wk.load(tmp_path / "s", allow=[f"{__name__}:tied"])
    assert again.b.weight is again.c.weight
    assert not again.a.bias.requires_grad
    assert again.a.weight.requires_grad


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.c.weight = self.b.weight
        self.a.bias.requires_grad_(False)

    def forward(self, x):
        y = self.a(x)
        return self.b(y) + self.c(y)


def tied():
    return Tied()
