"""Transposed, shared, gated and attending layers; sizes kept in Python; other numbers of dims."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from topologies.case import ConvBN, Net, case, point


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
