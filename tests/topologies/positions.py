"""Channels whose position means something: cut at a number, shifted, written in place, picked at a stride."""

from __future__ import annotations

import torch

from topologies.case import ConvBN, Net, case, point


class Cut(Net):
    """A stem of sixteen channels whose parts are treated differently; subclasses say how."""

    def __init__(self):
        super().__init__(stem=ConvBN(3, 16), mid=ConvBN(16, 6), head=point(6, 4))

    def forward(self, x):
        return self.head(self.mid(self.parts(self.stem(x))))


@case({"stem.conv": (11, "stem> >mid"), "mid.conv": (6, "mid> >head")}, ">stem head>")
class CutAtNumber(Cut):
    """The first five channels are fixed, since five stays; the others are free."""

    def parts(self, x):
        return torch.cat([x[:, :5].sin(), x[:, 5:].tanh()], 1)


@case({"stem.conv": (13, "stem> >mid"), "mid.conv": (6, "mid> >head")}, ">stem head>")
class CutFromTheEnd(Cut):
    def parts(self, x):
        return torch.cat([x[:, :-3].relu(), x[:, -3:].tanh()], 1)


@case(
    {"stem.conv": (5, "stem> >mid"), "stem.conv:2": (11, "stem> >mid"), "mid.conv": (6, "mid> >head")},
    ">stem head>",
)
class CutAtAttribute(Cut):
    """The bound follows, so both parts are free; they are two groups, since they are treated differently."""

    def __init__(self):
        super().__init__()
        self.n_first = 5

    def parts(self, x):
        return torch.cat([x[:, : self.n_first].sin(), x[:, self.n_first :].tanh()], 1)


@case(
    {"stem.conv": (2, "stem> >mid"), "mid.conv": (6, "mid> >head")},
    ">stem head>",
    shape=(4, 3, 8, 8),
    uncounted="counts are taken on one frame, and a clip has two",
)
class TemporalShift(Cut):
    """TSM (Lin et al. 2019): an eighth of the channels moves on by a frame, an eighth moves back, the rest stays."""

    def __init__(self):
        super().__init__()
        self.n_frames, self.fold_div = 2, 8

    def parts(self, x):
        n, c, h, w = x.size()
        x = x.view(n // self.n_frames, self.n_frames, c, h, w)
        fold = c // self.fold_div
        out = torch.zeros_like(x)
        out[:, :-1, :fold] = x[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
        return out.view(n, c, h, w)


@case({"mid.conv": (6, "mid> >head")}, ">stem stem> >mid head>")
class EverySecond(Cut):
    def parts(self, x):
        x = x.clone()
        x[:, ::2] *= -1
        return x


@case({"stem.conv": (4, "stem> >mid"), "mid.conv": (6, "mid> >head")}, ">stem head>")
class WrittenInPlace(Cut):
    """Four channels are overwritten, and eight meet at fixed places; the last four are free."""

    def parts(self, x):
        x = x.clone()
        x[:, :4] = 0.5
        x[:, 4:8] += x[:, 8:12]
        return x


@case({"stem.conv": (8, "stem> >mid"), "mid.conv": (6, "mid> >head")}, ">stem head>")
class CutInHalves(Cut):
    """A shift is a quotient: both halves lose the same positions."""

    def parts(self, x):
        half = x.shape[1] >> 1
        return torch.cat([x[:, :half].sin(), x[:, half:].tanh()], 1)
