"""Concatenation, grouped convolutions, shuffles, flattening and norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from topologies.case import ConvBN, Net, case, point


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
