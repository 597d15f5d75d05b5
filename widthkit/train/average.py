"""An exponential moving average of weights, which generalises better than the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """The average of a module's parameters and floating buffers over updates (Polyak and Juditsky 1992).

    After the first update it equals the module, after each further one it is
    ``decay * average + (1 - decay) * module``. Other buffers, such as counters, are copied.

    Args:
        net: The module; it stays as it is.
        decay: In ``[0, 1)``.

    Attributes:
        tensors: Name of a parameter or buffer -> its average, on the module's device.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> average = Average(net, 0.75)
    >>> for value in (4.0, 8.0):
    ...     _ = nn.init.constant_(net.weight, value)
    ...     average.update(net)
    >>> average.tensors["weight"]
    tensor([[5.]])
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.tensors = {name: tensor.detach().clone() for name, tensor in _tensors(net).items()}
        self._mix = get_ema_multi_avg_fn(decay)
        self._updates = 0

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Take the module's values after an update in."""
        now, mixed = _tensors(net), []
        for name, tensor in now.items():
            if self._updates and (tensor.is_floating_point() or tensor.is_complex()):
                mixed.append(name)
            else:
                self.tensors[name].copy_(tensor)
        if mixed:
            self._mix([self.tensors[name] for name in mixed], [now[name] for name in mixed], self._updates)
        self._updates += 1

    @torch.no_grad()
    def copy_to(self, net: nn.Module) -> None:
        """Give a module the averages, if there was an update."""
        if self._updates:
            for name, tensor in _tensors(net).items():
                tensor.copy_(self.tensors[name])

    def state_dict(self) -> dict[str, object]:
        """Return the averages and the number of updates."""
        return {"tensors": self.tensors, "updates": self._updates}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over what :meth:`state_dict` returned."""
        tensors, updates = state["tensors"], state["updates"]
        assert isinstance(tensors, dict)
        assert isinstance(updates, int)
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
        self._updates = updates


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    """Name every parameter and buffer once."""
    return dict(chain(net.named_parameters(), net.named_buffers()))
