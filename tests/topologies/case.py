"""Small networks, each declaring by hand which channels belong together.

Sites are spelled in a shorthand: ``stem>`` is what a layer produces (dim 0 of its weight and its bias; with the batch
norm, for a :class:`ConvBN`), ``>head`` what it reads (dim 1 of its weight), ``norm@`` all vectors of a normalisation,
``name[dim]`` any tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
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
