"""Models that people write: shared weights, side branches, odd inputs; every oracle on each of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from topologies import ConvBN, Net, PlainChain, point, randomised
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import oracles
from widthkit.errors import ModelError, TraceError
from widthkit.export.dense import export
from widthkit.trace import trace

SHAPE = (2, 3, 8, 8)


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape or SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Tied(Net):
    """An autoencoder whose decoder reads the encoder's matrix the other way round."""

    def __init__(self):
        super().__init__(stem=ConvBN(3, 8), code=nn.Linear(8, 6, bias=False), head=nn.Linear(8, 4))

    def forward(self, x):
        x = self.stem(x).mean((2, 3))
        return self.head(F.linear(self.code(x).relu(), self.code.weight.t()))


class SharedParameter(Net):
    """Two modules that hold the same parameter."""

    def __init__(self):
        super().__init__(stem=ConvBN(3, 6), a=point(6, 6), b=point(6, 6), head=point(6, 4))
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.a(self.stem(x)).relu()))


class CalledTwice(Net):
    """One head for two levels, as in RetinaNet."""

    def __init__(self):
        super().__init__(stem=ConvBN(3, 6), down=ConvBN(6, 6, stride=2), tower=ConvBN(6, 8), head=point(8, 4))

    def forward(self, x):
        x = self.stem(x)
        return [self.head(self.tower(level)) for level in (x, self.down(x))]


class SharedModule(Net):
    """Blocks that hold a part of the model, which so has several names (CoaT's position encodings)."""

    def __init__(self):
        super().__init__(stem=ConvBN(3, 6), part=point(6, 6))
        self.blocks = nn.ModuleList(Net(part=self.part, mlp=ConvBN(6, 6)) for _ in range(2))
        self.head = point(6, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block.mlp(x + block.part(x))
        return self.head(x)


class Unused(PlainChain):
    """Some modules wait for a call that never comes."""

    def __init__(self):
        super().__init__()
        self.spare = ConvBN(6, 9)


class Free(nn.Module):
    """Parameters without a module: a scale, a bias, a matrix."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = ConvBN(3, 6), nn.Linear(5, 4)
        self.scale, self.shift = nn.Parameter(torch.ones(6, 1, 1)), nn.Parameter(torch.zeros(1, 6, 1, 1))
        self.mix = nn.Parameter(torch.randn(6, 5))

    def forward(self, x):
        x = self.stem(x) * self.scale + self.shift
        return self.head(x.mean((2, 3)) @ self.mix)


class LoRA(nn.Module):
    """A frozen matrix with a low-rank branch beside it."""

    def __init__(self):
        super().__init__()
        self.stem, self.base, self.head = ConvBN(3, 8), nn.Linear(8, 10), nn.Linear(10, 4)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Linear(8, 3, bias=False), nn.Linear(3, 10, bias=False)

    def forward(self, x):
        x = self.stem(x).mean((2, 3))
        return self.head((self.base(x) + self.up(self.down(x)) * 0.5).relu())


class Embedded(Net):
    """Reads integers."""

    def __init__(self):
        super().__init__(table=nn.Embedding(11, 6), mid=nn.Linear(6, 8), head=nn.Linear(8, 4))

    def forward(self, tokens):
        return self.head(self.mid(self.table(tokens)).relu())


class Scaled(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, 1, 1, 1))

    def forward(self, weight):
        return weight * self.scale


class Parametrised(Net):
    """The kernel is computed anew at every call."""

    def __init__(self):
        super().__init__(stem=nn.Conv2d(3, 6, 3), head=point(6, 4))
        parametrize.register_parametrization(self.stem, "weight", Scaled(6))

    def forward(self, x):
        return self.head(self.stem(x).relu())


class Weighted(Net):
    """Weight norm as torch writes it today, a parametrisation of two tensors."""

    def __init__(self):
        super().__init__(stem=nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), head=point(6, 4))

    def forward(self, x):
        return self.head(self.stem(x).relu())


class Spread(PlainChain):
    """Returns a mapping of tuples."""

    def forward(self, x):
        y = self.mid(self.stem(x))
        return {"out": self.head(y), "aux": (y.mean((1, 2, 3)), None, 3)}


class Heads(nn.Module):
    """The head size is computed from the embedding width, in Python, at every call."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.dim = 2, 8
        self.stem, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.LayerNorm(8)
        self.qkv, self.proj, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        B, N, C = x.shape
        y = self.qkv(self.norm(x)).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*y.unbind(0)).transpose(1, 2).reshape(B, N, C)
        return self.head((x + self.proj(y)).mean(1))


class Stored(nn.Module):
    """Attention as in EVA-02: a fixed number of heads, rotated by one table for all blocks, back at the stream's size.

    The table ties the head sizes of all blocks; the stream is the output, so nothing of the heads can go.
    """

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.register_buffer("table", torch.rand(4, 4))
        self.blocks = nn.ModuleList(self.Block() for _ in range(4))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = 2
            self.norm, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x, table):
            B, N, C = x.shape
            q, k, v = self.qkv(self.norm(x)).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q * table, k * table, v).transpose(1, 2).reshape(B, N, C)
            x = x + self.proj(y)
            return x + self.down(self.up(x).relu())

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, self.table)
        return x


class MultiQuery(nn.Module):
    """All heads share one key and one value (Shazeer 2019), here by broadcasting; in MobileNetV4's hybrids."""

    def __init__(self):
        super().__init__()
        self.num_heads = 3
        self.stem, self.q, self.kv = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 12), nn.Linear(8, 10)
        self.proj, self.head = nn.Linear(18, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        q = self.q(x).unflatten(-1, (self.num_heads, 4)).transpose(1, 2)
        k, v = self.kv(x).unsqueeze(1).split([4, 6], -1)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x + self.proj(y)).mean(1))


class GroupedQueries(MultiQuery):
    """Two heads for every key."""

    def __init__(self):
        super().__init__()
        self.kv, self.proj = nn.Linear(8, 20), nn.Linear(24, 8)
        self.q, self.num_heads = nn.Linear(8, 16), 4

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        q = self.q(x).unflatten(-1, (self.num_heads, 4)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 10)).transpose(1, 2).split([4, 6], -1)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
        return self.head((x + self.proj(y)).mean(1))


class Recurrent(nn.Module):
    """Rows of the image as a sequence, both ways, through two layers."""

    def __init__(self):
        super().__init__()
        self.stem, self.mid, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 6), nn.Linear(10, 4)
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x):
        x = self.mid(self.stem(x).flatten(2).transpose(1, 2))
        return self.head(self.lstm(x)[0].mean(1))


class Lent(Net):
    """Takes over the types of tensors that have nothing to do with it."""

    def __init__(self):
        super().__init__(stem=ConvBN(3, 6), mid=ConvBN(6, 8), head=point(8, 4))
        self.register_buffer("table", torch.ones(7, 5, 3, 2, 1, dtype=torch.float64))

    def forward(self, x):
        return self.head(self.mid(self.stem(x).type_as(self.table)).to(self.table))


class Partial(Net):
    """Slices by a width that is kept as an attribute, and splits by sizes in a list."""

    def __init__(self):
        super().__init__(stem=ConvBN(3, 6), wide=ConvBN(6, 10), a=ConvBN(3, 4), b=ConvBN(7, 5), head=point(9, 4))
        self.inside, self.sizes = 6, [3, 7]

    def forward(self, x):
        x = self.stem(x)
        y = self.wide(x)
        y = torch.cat([y[:, : self.inside] + x, y[:, self.inside :]], 1)
        left, right = y.split(self.sizes, 1)
        return self.head(torch.cat([self.a(left), self.b(right)], 1))


class Packed(nn.Module):
    """torch's own attention."""

    def __init__(self):
        super().__init__()
        self.stem, self.mha = nn.Conv2d(3, 8, 4, stride=4), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.stem(x).flatten(2).transpose(1, 2))
        return self.head((x + self.mha(x, x, x, need_weights=False)[0]).mean(1))


CASES = {
    Tied: {"stem.conv": 8, "code": 6},
    SharedParameter: {"stem.conv": 6},
    CalledTwice: {"stem.conv": 6, "tower.conv": 8},
    SharedModule: {"stem.conv": 6, "blocks.1.mlp.conv": 6},
    Unused: {"stem.conv": 6, "mid.conv": 8},
    Free: {"stem.conv": 6, "mix": 5},
    LoRA: {"stem.conv": 8, "base": 10, "down": 3},
    Embedded: {"table": 6, "mid": 8},
    Parametrised: {"stem": 6},
    Weighted: {"stem": 6},
    Spread: {"stem.conv": 6, "mid.conv": 8},
    Heads: None,
    Stored: {f"blocks.{i}.up": 12 for i in range(4)},
    Lent: {"stem.conv": 6, "mid.conv": 8},
    MultiQuery: {"stem": 8, "q": 3},
    GroupedQueries: {"stem": 8},
    Recurrent: {"stem": 8},
    Partial: None,
    Packed: None,
}


def traced(kind: type[nn.Module]):
    torch.manual_seed(0)
    model = randomised(kind())
    x = torch.randint(0, 11, (2, 5)) if kind is Embedded else image()
    return model, (x,), trace(model, (x,))


@pytest.mark.parametrize("kind", CASES, ids=lambda k: k.__name__)
def test_oracles(kind):
    model, (x,), graph = traced(kind)
    if CASES[kind] is not None:
        assert sorted(graph.full.values()) == sorted(CASES[kind].values())
    assert graph.full
    rng = np.random.default_rng(0)
    oracles.check_permutation(model, graph, x, rng, each=True)
    net = oracles.supernet_of(model, graph)
    for widths in (net.space.smallest, net.space.sample(rng)):
        oracles.check_same_net(net, x, widths)
    slim = export(model, oracles.random_units(graph, rng), graph=graph)
    assert [t.shape for t in oracles.outputs(slim, x)] == [t.shape for t in oracles.outputs(model, x)]


@pytest.mark.parametrize("kind", [Heads, Partial, Packed], ids=lambda k: k.__name__)
def test_sizes_computed_in_python_do_not_freeze(kind):
    _, _, graph = traced(kind)
    assert graph.cost.searchable_share(graph.vector()) == 1.0
    assert sum(graph.full.values()) >= 4


@pytest.mark.parametrize("kind", [MultiQuery, GroupedQueries, Recurrent, Heads], ids=lambda k: k.__name__)
def test_macs_are_what_pytorch_counts(kind):
    model, (x,), graph = traced(kind)
    rng = np.random.default_rng(0)
    for units in ({n: np.arange(w) for n, w in graph.full.items()}, oracles.random_units(graph, rng)):
        slim = export(model, units, graph=graph)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            slim(x)
        assert 2 * len(x) * graph.macs({n: len(u) for n, u in units.items()}) == counter.get_total_flops()


def test_no_repair_is_needed_where_the_output_freezes_the_heads():
    """Copies keep hooks, so a hook counts runs: the first, three shrunk, two by values, one at twice the batch."""
    model, runs = randomised(Stored()), []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    trace(model, (image(),))
    assert len(runs) == 7


def test_attributes_follow_what_they_count():
    model, (x,), graph = traced(Partial)
    widths = {n: max(1, w - 1) for n, w in graph.full.items()}
    slim = export(model, widths, graph=graph)
    assert (
        slim.inside
        == slim.stem.conv.out_channels
        == slim.a.conv.in_channels + slim.b.conv.in_channels - (slim.wide.conv.out_channels - slim.inside)
    )
    assert slim.sizes == [slim.a.conv.in_channels, slim.b.conv.in_channels]
    assert model.sizes == [3, 7]
    assert type(model.inside) is int
    oracles.outputs(slim, x)


def test_half_precision_is_traced_and_exported():
    for dtype in (torch.float16, torch.bfloat16):
        model = PlainChain().to(dtype)
        graph = trace(model, SHAPE)
        slim = export(model, {"stem.conv": 3}, graph=graph)
        assert graph.full == {"stem.conv": 6, "mid.conv": 8}
        assert {p.dtype for p in slim.parameters()} == {dtype}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_a_gpu_stays_there():
    model = PlainChain().cuda()
    slim = export(model, {"stem.conv": 3}, example_inputs=SHAPE)
    assert {p.device.type for p in slim.parameters()} == {"cuda"}
    assert trace(model, torch.zeros(SHAPE, device="cuda")).full == {"stem.conv": 6, "mid.conv": 8}


def test_wrappers_for_several_devices_are_refused():
    class DistributedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    for wrapped in (DistributedDataParallel(PlainChain()), nn.DataParallel(PlainChain())):
        with pytest.raises(ModelError, match=r"pass model\.module"):
            trace(wrapped, SHAPE)
    with pytest.raises(ModelError, match="compiled"):
        trace(torch.compile(PlainChain()), SHAPE)


def test_patterns():
    model = CalledTwice()
    assert trace(model, SHAPE, freeze=["tow*"]).full == {"stem.conv": 6}
    assert trace(model, SHAPE, only=["tower"]).full == {"tower.conv": 8}
    assert trace(model, SHAPE, only=["tower", "stem"]).full == {"tower.conv": 8}
    assert trace(model, SHAPE, free_outputs=True).full == {"stem.conv": 6, "tower.conv": 8, "head": 4}
    with pytest.raises(TraceError, match="matches no module"):
        trace(model, SHAPE, freeze=["towr"])


def test_patterns_mean_what_a_module_produces():
    tokens = torch.randint(0, 11, (2, 5))
    assert trace(Embedded(), (tokens,), freeze=["table"]).full == {"mid": 8}
    assert trace(Embedded(), (tokens,), only=["table"]).full == {"table": 6}
    for bias in (False, True):
        up = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ConvTranspose2d(5, 6, 2, bias=bias), nn.Conv2d(6, 4, 1))
        assert trace(up, SHAPE, freeze=["1"]).full == {"0": 5}
        assert list(trace(up, SHAPE, only=["1"]).full.values()) == [6]


class Thresholded(PlainChain):
    """Control flow on values, as in detectors: how many rows remain is known only at run time."""

    def forward(self, x):
        y = self.mid(self.stem(x))
        scores = self.head(y).mean((2, 3))
        kept = torch.where(scores[:, 0] > scores[:, 0].median() - 1)[0]
        return y[kept].mean((2, 3)) @ self.head.weight[:, :, 0, 0].t()


def test_rows_that_are_kept_by_value_do_not_freeze_channels():
    model = randomised(Thresholded())
    graph = trace(model, image())
    assert graph.full == {"stem.conv": 6, "mid.conv": 8}
    oracles.check_permutation(model, graph, image(), np.random.default_rng(0), each=True)


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (lambda x: ({"image": x, "more": [x, (x,)]},), {"stem.conv": 6, "mid.conv": 8}),
        (lambda x: ([x, x],), {"stem.conv": 6, "mid.conv": 8}),
    ],
)
def test_nested_inputs(inputs, names):
    class Nested(PlainChain):
        def forward(self, batch):
            x = batch["image"] + batch["more"][1][0] if isinstance(batch, dict) else torch.cat(batch)
            return super().forward(x)

    assert trace(Nested(), inputs(torch.zeros(SHAPE))).full == names
