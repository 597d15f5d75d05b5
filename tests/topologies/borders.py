"""Computed weights, inputs and outputs, padding, and unusual operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from topologies.case import ConvBN, Net, case, point


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
