"""Small networks, each declaring by hand which channels belong together.

Sites are spelled in a shorthand: ``stem>`` is what a layer produces (dim 0 of its weight and its bias; with the batch
norm, for a :class:`ConvBN`), ``>head`` what it reads (dim 1 of its weight), ``norm@`` all vectors of a normalisation,
``name[dim]`` any tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Sites = set[tuple[str, int]]
CASES: list[Case] = []


@dataclass(frozen=True, eq=False)
class Case:
    """One network and what is true of it.

    Args:
        name: Shown by pytest.
        build: Makes the network; call :meth:`model` instead.
        shape: Shape of the example input.
        groups: Group name -> (width, sites in the shorthand).
        frozen: The weight and bias dims that are in no group, kernels aside, in the shorthand.
        uncounted: Why fvcore misses a layer, ``""`` where it counts all.
        cut: Why zeroing what consumers read is not the same as dropping, ``""`` where it is.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 3, 8, 8)
    groups: dict[str, tuple[int, str]] = field(default_factory=dict)
    frozen: str = ""
    cut: str = ""
    uncounted: str = ""

    def __str__(self) -> str:
        return self.name

    def model(self) -> nn.Module:
        """The network in float64 and evaluation mode, with nothing left at its default."""
        torch.manual_seed(0)
        return randomised(self.build())

    def inputs(self) -> Tensor:
        return torch.randn(self.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def randomised(model: nn.Module) -> nn.Module:
    """Give norms, biases and free-standing vectors values that tell channels apart."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.ndim <= 1 and tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
        assert name
    return model.double().eval()


def sites(model: nn.Module, text: str) -> Sites:
    """Expand the shorthand."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    modules = dict(model.named_modules())
    found: Sites = set()
    for word in text.split():
        if word.startswith(">"):
            name = word[1:]
            found.add((f"{name}.conv.weight" if isinstance(modules[name], ConvBN) else f"{name}.weight", 1))
        elif word.endswith((">", "@")):
            name = word[:-1]
            parts = [f"{name}.conv", f"{name}.bn"] if isinstance(modules[name], ConvBN) else [name]
            keys = [f"{p}.{k}" for p in parts for k in ("weight", "bias", "running_mean", "running_var")]
            found |= {(key, 0) for key in keys if key in tensors}
        else:
            name, _, dim = word.rstrip("]").partition("[")
            found.add((name, int(dim)))
    return found


def case(groups: dict[str, tuple[int, str]], frozen: str, **options):
    """Register a network class as a case."""

    def add(cls: type[nn.Module]) -> type[nn.Module]:
        CASES.append(Case(cls.__name__, cls, groups=groups, frozen=frozen, **options))
        return cls

    return add


class ConvBN(nn.Sequential):
    """Convolution, batch norm, activation."""

    def __init__(self, i: int, o: int, k: int = 3, act: bool = True, **options) -> None:
        super().__init__()
        options.setdefault("padding", k // 2 * options.get("dilation", 1))
        self.conv = nn.Conv2d(i, o, k, bias=False, **options)
        self.bn = nn.BatchNorm2d(o)
        if act:
            self.act = nn.ReLU()


class Net(nn.Module):
    """A network described by its layers; subclasses say how they meet."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


def point(i: int, o: int, **options) -> nn.Conv2d:
    return nn.Conv2d(i, o, 1, **options)


@case({"stem.conv": (6, "stem> >mid"), "mid.conv": (8, "mid> >head")}, ">stem head>")
class PlainChain(Net):
    def __init__(self):
        super().__init__(stem=ConvBN(3, 6), mid=ConvBN(6, 8), head=point(8, 4))

    def forward(self, x):
        return self.head(self.mid(self.stem(x)))


@case({"stem.conv": (6, "stem> >mid"), "mid.conv": (8, "mid> >head")}, ">stem head>")
class DilatedChain(Net):
    def __init__(self):
        super().__init__(stem=ConvBN(3, 6, dilation=2), mid=ConvBN(6, 8, stride=2, dilation=2), head=point(8, 4))

    def forward(self, x):
        return self.head(self.mid(self.stem(x)))


@case({"stem.conv": (8, "stem> >a b> >head"), "a.conv": (6, "a> >b")}, ">stem head>")
class Residual(Net):
    def __init__(self):
        super().__init__(stem=ConvBN(3, 8), a=ConvBN(8, 6), b=ConvBN(6, 8, act=False), head=point(8, 4))

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(x + self.b(self.a(x))))


@case(
    {
        "stem.conv": (8, "stem> >a >down"),
        "a.conv": (7, "a> >b"),
        "b.conv": (12, "b> down> >c d> >head"),
        "c.conv": (5, "c> >d"),
    },
    ">stem head>",
)
class ResidualDownsample(Net):
    def __init__(self):
        super().__init__(
            stem=ConvBN(3, 8),
            a=ConvBN(8, 7, stride=2),
            b=ConvBN(7, 12, act=False),
            down=ConvBN(8, 12, 1, act=False, stride=2),
            c=ConvBN(12, 5),
            d=ConvBN(5, 12, act=False),
            head=nn.Linear(12, 4),
        )

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.b(self.a(x)) + self.down(x))
        x = F.relu(x + self.d(self.c(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


@case({"stem.conv": (8, "stem> >a b> >c"), "a.conv": (8, "a> >b c> >head")}, ">stem head>")
class ResidualAcrossStages(Net):
    def __init__(self):
        super().__init__(stem=ConvBN(3, 8), a=ConvBN(8, 8), b=ConvBN(8, 8), c=ConvBN(8, 8), head=point(8, 4))

    def forward(self, x):
        first = self.stem(x)
        second = self.a(first)
        third = self.b(second) + first
        return self.head(self.c(third) + second)


@case({"stem.conv": (8, "stem> dw> >pw"), "pw.conv": (6, "pw> >head")}, ">stem head>")
class DepthwiseSeparable(Net):
    def __init__(self):
        super().__init__(stem=ConvBN(3, 8), dw=ConvBN(8, 8, groups=8), pw=ConvBN(8, 6, 1), head=point(6, 4))

    def forward(self, x):
        return self.head(self.pw(self.dw(self.stem(x))))


@case({"stem.conv": (4, "stem> dw> >head")}, ">stem head>")
class DepthwiseMultiplier(Net):
    def __init__(self):
        super().__init__(stem=ConvBN(3, 4), dw=ConvBN(4, 8, groups=4), head=point(8, 4))

    def forward(self, x):
        return self.head(self.dw(self.stem(x)))


@case({"stem.conv": (6, "stem> >up down> >head"), "up.conv": (12, "up> dw> >down")}, ">stem head>")
class InvertedResidual(Net):
    def __init__(self):
        super().__init__(
            stem=ConvBN(3, 6),
            up=ConvBN(6, 12, 1),
            dw=ConvBN(12, 12, groups=12),
            down=ConvBN(12, 6, 1, act=False),
            head=point(6, 4),
        )

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.down(self.dw(self.up(x))))


@case({"stem.conv": (8, "stem> >squeeze excite> >head"), "squeeze": (4, "squeeze> >excite")}, ">stem head>")
class SqueezeExcite(Net):
    def __init__(self):
        super().__init__(stem=ConvBN(3, 8), squeeze=point(8, 4), excite=point(4, 8), head=point(8, 4))

    def forward(self, x):
        x = self.stem(x)
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return self.head(x * gate.sigmoid())


@case(
    {
        "stem.conv": (6, "stem> >up down> >head"),
        "up.conv": (12, "up> dw> >squeeze excite> >down"),
        "squeeze": (3, "squeeze> >excite"),
    },
    ">stem head>",
)
class InvertedResidualSE(Net):
    def __init__(self):
        super().__init__(
            stem=ConvBN(3, 6),
            up=ConvBN(6, 12, 1),
            dw=ConvBN(12, 12, groups=12),
            squeeze=nn.Linear(12, 3),
            excite=nn.Linear(3, 12),
            down=ConvBN(12, 6, 1, act=False),
            head=point(6, 4),
        )

    def forward(self, x):
        x = self.stem(x)
        y = self.dw(self.up(x))
        gate = self.excite(F.silu(self.squeeze(y.mean((2, 3)))))
        return self.head(x + self.down(y * F.hardsigmoid(gate)[:, :, None, None]))


@case({"a.conv": (4, "a> >head"), "b.conv": (6, "b> >head")}, ">a >b head>")
class ConcatTwo(Net):
    def __init__(self):
        super().__init__(a=ConvBN(3, 4), b=ConvBN(3, 6), head=point(10, 4))

    def forward(self, x):
        return self.head(torch.cat([self.a(x), self.b(x)], 1))


@case(
    {
        "stem": (6, "stem> n1@ >c1 n2@ >c2 n3@ >c3 norm@ >head"),
        "c1": (4, "c1> n2@ >c2 n3@ >c3 norm@ >head"),
        "c2": (4, "c2> n3@ >c3 norm@ >head"),
        "c3": (4, "c3> norm@ >head"),
    },
    ">stem head>",
)
class DenseBlock(Net):
    def __init__(self):
        norms = {name: nn.BatchNorm2d(n) for name, n in (("n1", 6), ("n2", 10), ("n3", 14), ("norm", 18))}
        convs = {f"c{i + 1}": nn.Conv2d(6 + 4 * i, 4, 3, padding=1) for i in range(3)}
        super().__init__(stem=point(3, 6), **norms, **convs, head=point(18, 4))

    def forward(self, x):
        parts = [self.stem(x)]
        for conv, norm in ((self.c1, self.n1), (self.c2, self.n2), (self.c3, self.n3)):
            parts.append(conv(F.relu(norm(torch.cat(parts, 1)))))
        return self.head(F.relu(self.norm(torch.cat(parts, 1))))


@case({"stem.conv": (6, "stem> >head")}, ">stem head>")
class CatSelf(Net):
    def __init__(self):
        super().__init__(stem=ConvBN(3, 6), head=point(12, 4))

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.cat([x, x], 1))


@case(
    {"stem.conv": (4, "stem> >a >b >c a> >head"), "stem.conv:2": (2, "stem> >a >b >c b> >head"), "c": (3, "c> >d")},
    ">stem head> d>",
)
class ResidualOverConcat(Net):
    def __init__(self):
        super().__init__(
            stem=ConvBN(3, 6), a=ConvBN(6, 4), b=ConvBN(6, 2), c=point(6, 3), d=point(3, 4), head=point(6, 4)
        )

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + torch.cat([self.a(x), self.b(x)], 1)) + self.d(F.relu(self.c(x)))


@case(
    {
        "stem.conv": (6, "stem> >a >b1 >c1 >pool"),
        "a.conv": (4, "a> >head"),
        "b1.conv": (3, "b1> >b2"),
        "b2.conv": (5, "b2> >head"),
        "c1.conv": (3, "c1> >c2"),
        "c2.conv": (4, "c2> >c3"),
        "c3.conv": (4, "c3> >head"),
        "pool.conv": (2, "pool> >head"),
    },
    ">stem head>",
)
class Inception(Net):
    def __init__(self):
        super().__init__(
            stem=ConvBN(3, 6),
            a=ConvBN(6, 4, 1),
            b1=ConvBN(6, 3, 1),
            b2=ConvBN(3, 5),
            c1=ConvBN(6, 3, 1),
            c2=ConvBN(3, 4),
            c3=ConvBN(4, 4),
            pool=ConvBN(6, 2, 1),
            head=nn.Linear(15, 4),
        )

    def forward(self, x):
        x = self.stem(x)
        pooled = self.pool(F.max_pool2d(x, 3, 1, 1))
        x = torch.cat([self.a(x), self.b2(self.b1(x)), self.c3(self.c2(self.c1(x))), pooled], 1)
        return self.head(F.avg_pool2d(x, 8).flatten(1))


@case({"stem.conv": (4, "stem> >g"), "g.conv": (6, "g> >head")}, ">stem head>")
class GroupedByPosition(Net):
    def __init__(self):
        super().__init__(stem=ConvBN(3, 8), g=ConvBN(8, 12, groups=2), head=point(12, 4))

    def forward(self, x):
        return self.head(self.g(self.stem(x)))


@case({"stem.conv": (8, "stem> g> >head")}, ">stem >g head>")
class GroupedByGroup(Net):
    def __init__(self):
        super().__init__(stem=ConvBN(3, 16), g=ConvBN(16, 16, groups=8), head=point(16, 4))

    def forward(self, x):
        return self.head(self.g(self.stem(x)))


@case({"stem.conv": (4, "stem> >b1 b3> >head"), "b1.conv": (4, "b1> b2> >b3")}, ">stem head>")
class ShuffleUnit(Net):
    def __init__(self):
        super().__init__(
            stem=ConvBN(3, 8),
            b1=ConvBN(4, 4, 1),
            b2=ConvBN(4, 4, groups=4, act=False),
            b3=ConvBN(4, 4, 1),
            head=point(8, 4),
        )

    def forward(self, x):
        left, right = self.stem(x).chunk(2, dim=1)
        x = torch.cat((left, self.b3(self.b2(self.b1(right)))), dim=1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.head(x)


@case({"stem.conv": (6, "stem> >fc"), "fc": (9, "fc> >head")}, ">stem head>")
class FlattenLinear(Net):
    def __init__(self):
        super().__init__(stem=ConvBN(3, 6), fc=nn.Linear(96, 9), head=nn.Linear(9, 4))

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 2)
        return self.head(F.relu(self.fc(torch.flatten(x, 1))))


@case({"stem.conv": (6, "stem> >fc"), "fc": (9, "fc> norm@ >head")}, ">stem head>")
class GlobalPoolLinear(Net):
    def __init__(self):
        super().__init__(stem=ConvBN(3, 6), fc=nn.Linear(6, 9), norm=nn.BatchNorm1d(9), head=nn.Linear(9, 4))

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.stem(x), 1).squeeze(-1).squeeze(-1)
        return self.head(F.relu(self.norm(self.fc(x))))


@case(
    {"stem.conv": (8, "gamma[0] stem> dw> norm@ >up down> >head"), "up": (16, "up> >down")},
    ">stem head>",
    cut="the mean of a layer norm counts zeroed channels",
)
class ConvNeXtBlock(Net):
    def __init__(self):
        super().__init__(
            stem=ConvBN(3, 8),
            dw=nn.Conv2d(8, 8, 3, padding=1, groups=8),
            norm=nn.LayerNorm(8),
            up=nn.Linear(8, 16),
            down=nn.Linear(16, 8),
            head=point(8, 4),
        )
        self.gamma = nn.Parameter(torch.ones(8))

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return self.head(x + y.permute(0, 3, 1, 2))


@case({"stem": (4, "stem> norm@ >head")}, ">stem head>", cut="a norm group counts zeroed channels")
class GroupNormNet(Net):
    def __init__(self):
        super().__init__(stem=point(3, 8), norm=nn.GroupNorm(2, 8), head=point(8, 4))

    def forward(self, x):
        return self.head(F.relu(self.norm(self.stem(x))))


@case({"stem": (8, "stem> norm@ >head")}, ">stem head>")
class InstanceNormNet(Net):
    def __init__(self):
        norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        super().__init__(stem=point(3, 8), norm=norm, head=point(8, 4))

    def forward(self, x):
        return self.head(F.relu(self.norm(self.stem(x))))


@case(
    {"stem.conv": (6, "stem> up.weight[0]"), "up": (5, "up.weight[1] up.bias[0] norm@ >head")},
    ">stem head>",
)
class Transposed(Net):
    def __init__(self):
        up = nn.ConvTranspose2d(6, 5, 3, stride=2, output_padding=1)
        super().__init__(stem=ConvBN(3, 6), up=up, norm=nn.BatchNorm2d(5), head=point(5, 4))

    def forward(self, x):
        return self.head(F.relu(self.norm(self.up(self.stem(x)))))


@case(
    {"stem.conv": (4, "stem> up.weight[0]"), "up": (6, "up.weight[1] up.bias[0] >head")},
    ">stem head>",
)
class TransposedGrouped(Net):
    def __init__(self):
        up = nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2)
        super().__init__(stem=ConvBN(3, 8), up=up, head=point(12, 4))

    def forward(self, x):
        return self.head(self.up(self.stem(x)).relu())


@case({"stem.conv": (8, "stem> shared> >shared >head")}, ">stem head>")
class SharedModule(Net):
    def __init__(self):
        super().__init__(stem=ConvBN(3, 8), shared=ConvBN(8, 8), head=point(8, 4))

    def forward(self, x):
        return self.head(self.shared(self.shared(self.stem(x))))


@case({"stem.conv": (6, "stem> >a"), "a": (9, "a> b.bias[0] >head")}, ">stem head>")
class TiedWeight(Net):
    def __init__(self):
        super().__init__(stem=ConvBN(3, 6), a=point(6, 9), b=point(6, 9), head=point(9, 4))
        self.b.weight = self.a.weight

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(self.a(x)) + F.relu(self.b(2 * x)))


@case(
    {"stem.conv": (6, "stem> >side >head"), "side.conv": (5, "side>")},
    ">stem head> dead> >dead",
    uncounted="jit removes the branch whose result is thrown away",
)
class DeadBranch(Net):
    """``side`` runs and is thrown away; ``dead`` never runs."""

    def __init__(self):
        super().__init__(stem=ConvBN(3, 6), side=ConvBN(6, 5), dead=ConvBN(8, 7), head=point(6, 4))

    def forward(self, x):
        x = self.stem(x)
        self.side(x)
        return self.head(x)


@case({"stem": (6, "stem> act@ >head")}, ">stem head>")
class PReLUNet(Net):
    def __init__(self):
        super().__init__(stem=point(3, 6), act=nn.PReLU(6), head=point(6, 4))

    def forward(self, x):
        return self.head(self.act(self.stem(x)))


@case({"stem": (6, "stem> >head")}, ">stem head>")
class GatedUnit(Net):
    def __init__(self):
        super().__init__(stem=point(3, 12), head=point(6, 4))

    def forward(self, x):
        return self.head(F.glu(self.stem(x), dim=1))


@case({"stem": (5, "stem> >head")}, ">stem head>")
class PixelShuffleNet(Net):
    def __init__(self):
        super().__init__(stem=point(3, 20), up=nn.PixelShuffle(2), head=point(5, 4))

    def forward(self, x):
        return self.head(F.relu(self.up(self.stem(x))))


@case({"stem": (6, "scale[0] shift[1] stem> >head")}, ">stem head>")
class LearnedScale(Net):
    def __init__(self):
        super().__init__(stem=point(3, 6), head=point(6, 4))
        self.scale = nn.Parameter(torch.rand(6, 1, 1))
        self.shift = nn.Parameter(torch.rand(1, 6, 1, 1))

    def forward(self, x):
        return self.head(F.relu(self.stem(x) * self.scale + self.shift))


@case({"mix": (7, "mix[0] >head"), "stem.conv": (6, "mix[1] stem>")}, ">stem head>")
class EinsumMix(Net):
    def __init__(self):
        super().__init__(stem=ConvBN(3, 6), head=point(7, 4))
        self.mix = nn.Parameter(torch.randn(7, 6))

    def forward(self, x):
        return self.head(torch.einsum("bchw,dc->bdhw", self.stem(x), self.mix).relu())


@case(
    {"stem": (8, "stem> >qkv proj> >head"), "qkv": (4, "qkv> >proj")},
    ">stem head>",
    cut="scores add up over channels that consumers cannot zero",
)
class Attention(Net):
    """Heads and their size live in Python attributes."""

    def __init__(self):
        super().__init__(stem=point(3, 8), qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8), head=point(8, 4))
        self.heads, self.head_dim = 2, 4

    def forward(self, x):
        x = self.stem(x)
        b, _, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).reshape(b, h * w, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (q @ k.transpose(-2, -1) * 0.5).softmax(dim=-1)
        mixed = (scores @ v).transpose(1, 2).reshape(b, h * w, self.heads * self.head_dim)
        x = x + self.proj(mixed).transpose(1, 2).reshape(b, -1, h, w)
        return self.head(x)


@case({"stem": (4, "stem> >a"), "stem:2": (6, "stem> >b")}, ">stem a> b>")
class SplitStored(Net):
    def __init__(self):
        super().__init__(stem=point(3, 10), a=point(4, 5), b=point(6, 5))
        self.sizes = [4, 6]

    def forward(self, x):
        left, right = torch.split(self.stem(x), self.sizes, dim=1)
        return self.a(left.relu()) * self.b(right)


@case({"stem": (4, "stem> >a"), "stem:2": (6, "stem> >b")}, ">stem a> b>")
class SliceStored(Net):
    def __init__(self):
        super().__init__(stem=point(3, 10), a=point(4, 5), b=point(6, 5))
        self.k = 4

    def forward(self, x):
        x = self.stem(x)
        return self.a(x[:, : self.k].relu()) * self.b(x[:, self.k :])


@case(
    {"down1.conv": (6, "down1> >down2 >up1"), "down2.conv": (8, "down2> >up1"), "up1.conv": (5, "up1> >head")},
    ">down1 head>",
)
class UNet(Net):
    def __init__(self):
        super().__init__(down1=ConvBN(3, 6), down2=ConvBN(6, 8, stride=2), up1=ConvBN(14, 5), head=point(5, 4))

    def forward(self, x):
        skip = self.down1(x)
        deep = F.interpolate(self.down2(skip), scale_factor=2, mode="bilinear")
        return self.head(self.up1(torch.cat([skip, deep], 1)))


@case({"a": (6, "a> norm@ >b"), "b": (5, "b> >head")}, ">a head>", shape=(2, 3, 16))
class Conv1dNet(Net):
    def __init__(self):
        super().__init__(a=nn.Conv1d(3, 6, 3), norm=nn.BatchNorm1d(6), b=nn.Conv1d(6, 5, 3), head=nn.Linear(5, 4))

    def forward(self, x):
        return self.head(self.b(self.norm(self.a(x)).relu()).relu().mean(-1))


@case({"a": (6, "a> norm@ dw> >b"), "b": (5, "b> >head")}, ">a head>", shape=(1, 3, 4, 6, 6))
class Conv3dNet(Net):
    def __init__(self):
        super().__init__(
            a=nn.Conv3d(3, 6, 3, padding=1),
            norm=nn.BatchNorm3d(6),
            dw=nn.Conv3d(6, 6, (3, 1, 1), groups=6),
            b=nn.Conv3d(6, 5, 1),
            head=nn.Linear(5, 4),
        )

    def forward(self, x):
        x = F.avg_pool3d(self.b(self.dw(self.norm(self.a(x)).relu())), (2, 3, 3))
        return self.head(x.relu().amax((2, 3, 4)))


class StandardisedConv(nn.Conv2d):
    """Computes its weight before it uses it."""

    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias, self.stride, self.padding)


@case(
    {"a": (6, "a> norm@ >b"), "b": (8, "b> >head")},
    ">a head>",
    cut="the standardised weight depends on the columns that are zeroed",
)
class WeightStandardised(Net):
    def __init__(self):
        super().__init__(
            a=StandardisedConv(3, 6, 3), norm=nn.BatchNorm2d(6), b=StandardisedConv(6, 8, 3), head=point(8, 4)
        )

    def forward(self, x):
        return self.head(self.b(self.norm(self.a(x)).relu()).relu())


@case({"stem.conv": (6, "stem> >boxes >mid"), "mid.conv": (5, "mid> >scores")}, ">stem boxes> scores>")
class TwoHeads(Net):
    def __init__(self):
        super().__init__(stem=ConvBN(3, 6), boxes=point(6, 4), mid=ConvBN(6, 5), scores=point(5, 2))

    def forward(self, x):
        x = self.stem(x)
        return {"boxes": self.boxes(x), "scores": [self.scores(self.mid(x))]}


@case({"a.conv": (6, "a> >b"), "mid.conv": (5, "mid> >head")}, ">a b> >mid head>")
class InputResidual(Net):
    """The model's own input comes back: three channels that are not ours to drop."""

    def __init__(self):
        super().__init__(a=ConvBN(3, 6), b=ConvBN(6, 3, act=False), mid=ConvBN(3, 5), head=point(5, 4))

    def forward(self, x):
        return self.head(self.mid(x + self.b(self.a(x))))


@case({"stem.conv": (4, "stem> >a a> >head")}, ">stem head>")
class PaddedShortcut(Net):
    """Padding adds two channels of zeros on either side; what they meet stays."""

    def __init__(self):
        super().__init__(stem=ConvBN(3, 4), a=ConvBN(4, 8, stride=2), head=point(8, 4))

    def forward(self, x):
        x = self.stem(x)
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.head(F.relu(self.a(x) + shortcut))


@case({"stem.conv": (6, "stem> >a"), "a.conv": (7, "a> >b"), "b": (5, "b> >head")}, ">stem head>")
class PaddedImages(Net):
    """Padding beside the image, of every mode, is no business of the channels."""

    def __init__(self):
        super().__init__(stem=ConvBN(3, 6), a=ConvBN(6, 7, padding=0), b=nn.Conv2d(7, 5, 3), head=point(5, 4))

    def forward(self, x):
        x = F.pad(self.stem(x), (0, 1, 0, 1))
        x = F.pad(self.a(x), (1, 1, 1, 0), mode="reflect")
        x = F.pad(x, (0, 0, 1, 1), value=-torch.inf)
        return self.head(F.pad(self.b(F.max_pool2d(x, 2)), (-1, 1)))


@case({"mid.conv": (5, "mid> >head")}, ">stem stem> >mid head>")
class Frequencies(Net):
    """Every channel has a frequency of its own, as in a Fourier position embedding."""

    def __init__(self):
        super().__init__(stem=ConvBN(3, 6), mid=ConvBN(6, 5), head=point(5, 4))

    def forward(self, x):
        x = self.stem(x)
        rates = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        return self.head(self.mid((x * rates[:, None, None]).sin()))


@case(
    {"stem.conv": (6, "stem> >mid"), "mid.conv": (5, "mid> >head")},
    ">stem head>",
    cut="the norm over channels adds up what consumers cannot zero",
)
class Normalised(Net):
    """The norm over channels is expanded again to as many channels as there are."""

    def __init__(self):
        super().__init__(stem=ConvBN(3, 6), mid=ConvBN(6, 5), head=point(5, 4))

    def forward(self, x):
        x = F.normalize(self.stem(x), dim=1)
        return self.head(F.normalize(self.mid(x), dim=1))


@case({"stem": (4, "stem> >head")}, ">stem head>")
class Unfolded(Net):
    def __init__(self):
        super().__init__(stem=point(3, 4), head=nn.Linear(36, 5))

    def forward(self, x):
        windows = F.unfold(self.stem(x), 3, padding=1)
        return self.head(windows.transpose(1, 2))


@case({"mid.conv": (5, "mid> >head")}, ">stem stem> >mid head>")
class EfficientAttention(Net):
    """A convolution slides over the channels, whose order then matters."""

    def __init__(self):
        eca = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        super().__init__(stem=ConvBN(3, 8), eca=eca, mid=ConvBN(8, 5), head=point(5, 4))

    def forward(self, x):
        x = self.stem(x)
        y = self.eca(x.mean((2, 3)).unsqueeze(1)).sigmoid()
        return self.head(self.mid(x * y.transpose(1, 2).unsqueeze(-1)))


@case({"stem": (8, "stem> >mid"), "mid": (6, "mid> >head")}, ">stem head>")
class EmptyPrefix(Net):
    """Prefix tokens are set aside and put back, and there are none: the slices are empty, the channels untouched."""

    def __init__(self):
        super().__init__(stem=point(3, 8), mid=nn.Linear(8, 6), head=nn.Linear(6, 4))
        self.n_prefix = 0

    def forward(self, x):
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        prefix, rest = tokens[:, : self.n_prefix], tokens[:, self.n_prefix :]
        return self.head(self.mid(torch.cat([prefix, rest.relu()], 1)))


@case({"stem": (6, "stem> >mid"), "mid": (5, "mid> >head")}, ">stem head>")
class WrittenByIndex(Net):
    """Rows are written into a fresh tensor where an index or a mask says, as detectors do with their regions."""

    def __init__(self):
        super().__init__(stem=point(3, 6), mid=nn.Linear(6, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        rows = self.stem(x).permute(0, 2, 3, 1).reshape(-1, self.stem.out_channels)
        places = torch.arange(len(rows), device=rows.device).flip(0)
        turned = torch.zeros_like(rows)
        turned[places] = rows
        mixed = self.mid(turned)
        mixed[places % 2 == 0] = 0.5
        return self.head(mixed)
