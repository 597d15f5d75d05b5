"""Plain chains, residual connections, depthwise convolutions and squeeze-excite."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from topologies.case import ConvBN, Net, case, point


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
