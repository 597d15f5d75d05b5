"""Backbones: the feature maps of a network, with their true channel counts and strides."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import FeatureInfo
from torch import Tensor, nn

from widthkit.errors import ModelError, OptionError
from widthkit.export.module_chain import Link, find_module_chain
from widthkit.modules.clone import meta_clone, named_tensors, real_clone
from widthkit.modules.models import input_channels


class Backbone(nn.Module):
    """A chain of modules; the results of some of them are the feature maps.

    The children run in order, so torchvision's ``IntermediateLayerGetter`` and ``BackboneWithFPN`` can use it::

        BackboneWithFPN(body, body.return_layers, body.channels, 256)

    Channel counts and strides come from a run on the meta device. They stay true when the backbone itself is traced
    and slimmed; with ``free_outputs=True`` the widths of the maps vary too.

    Args:
        stages: Name -> module, in order.
        maps: Names of the stages whose results are the feature maps, in order.
        indices: The index of each map among all maps of the network; see :func:`backbone`.
        image: Height and width of the example image.
        output: ``"dict"`` returns ``{"0": map, ...}`` as torchvision's detectors read it, ``"list"`` a list as timm's
            ``features_only`` gives it.
    """

    def __init__(
        self,
        stages: OrderedDict[str, nn.Module],
        maps: Sequence[str],
        indices: Sequence[int],
        image: tuple[int, int],
        output: str = "dict",
    ) -> None:
        super().__init__()
        for name, module in stages.items():
            self.add_module(name, module)
        self.maps = tuple(maps)
        self.out_indices = tuple(indices)
        self.image = image
        self.output = output
        self._cached_shapes: tuple[Any, list[tuple[int, ...]]] | None = None

    def forward(self, x: Tensor) -> Any:
        """Return the feature maps of images ``[N, C, H, W]``, finest first."""
        found = []
        for name, module in self.named_children():
            x = module(x)
            if name in self.maps:
                found.append(x)
        if self.output == "list":
            return found
        return OrderedDict((str(i), value) for i, value in enumerate(found))

    @property
    def channels(self) -> list[int]:
        """Number of channels of every feature map."""
        return [shape[1] for shape in self._shapes()]

    @property
    def strides(self) -> list[int]:
        """Pixels of the image per position of every feature map."""
        return [round(self.image[0] / shape[2]) for shape in self._shapes()]

    @property
    def out_channels(self) -> int:
        """Number of channels if all feature maps have the same, as torchvision's detectors read it.

        Raises:
            ModelError: If they differ.
        """
        channels = self.channels
        if len(set(channels)) > 1:
            raise ModelError(
                f"the feature maps have {channels} channels, a detector wants one number; use "
                "BackboneWithFPN(body, body.return_layers, body.channels, 256) or one entry in out_indices"
            )
        return channels[0]

    @property
    def return_layers(self) -> dict[str, str]:
        """Stage -> name of its map, as ``IntermediateLayerGetter`` reads it."""
        return {name: str(i) for i, name in enumerate(self.maps)}

    @property
    def feature_info(self) -> FeatureInfo:
        """The attribute of timm's ``features_only`` networks: ``.channels()``, ``.reduction()``, ``.module_name()``."""
        rows = zip(self.channels, self.strides, self.maps, self.out_indices, strict=True)
        info = [{"num_chs": c, "reduction": s, "module": name, "index": i} for c, s, name, i in rows]
        return FeatureInfo(info, tuple(range(len(info))))

    def _shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of the maps on the example image; computed anew only if a tensor has changed its shape."""
        key = tuple((name, tuple(t.shape)) for name, t in named_tensors(self).items())
        if self._cached_shapes is None or self._cached_shapes[0] != key:
            clone = meta_clone(self).eval()
            with torch.no_grad():
                first = next((t for t in clone.parameters()), torch.empty(0, 3))
                x = torch.empty(1, input_channels(self), *self.image, device="meta", dtype=first.dtype)
                maps = clone(x)
            values = maps if self.output == "list" else maps.values()
            self._cached_shapes = key, [tuple(t.shape) for t in values]
        return self._cached_shapes[1]


def backbone(
    net: nn.Module, out_indices: Sequence[int] | None = None, *, example_inputs: Any = None, output: str = "dict"
) -> Backbone:
    """Turn a classifier, slim or dense, into a backbone that returns feature maps.

    A feature map is the last result at each resolution on the way from the image to the head; map 0 is the finest.
    For timm's models the maps are those of timm's ``feature_info``, so the indices are timm's.

    Args:
        net: A network whose modules run one after another; it is not changed.
        out_indices: Which maps to return; negative indices count from the coarsest; the last four by default.
        example_inputs: As in :func:`widthkit.trace`; strides are exact if the network's stride divides both sides.
        output: ``"dict"`` for torchvision's detectors, ``"list"`` as timm's ``features_only``.

    Raises:
        ModelError: If the network is not such a chain, or has no such map.
        OptionError: If ``output`` is neither of the two.

    >>> import widthkit as wk
    >>> body = backbone(wk.create_model("torchvision/resnet18"), (1, 2, 3, 4), example_inputs=(1, 3, 64, 64))
    >>> body.channels, body.strides
    ([64, 128, 256, 512], [4, 8, 16, 32])
    """
    if output not in ("dict", "list"):
        raise OptionError(f"output='{output}': write 'dict' (torchvision) or 'list' (timm)")
    links, image = find_module_chain(net, example_inputs)
    ends = _map_links(net, links)
    chosen = _check_indices(out_indices, len(ends), type(net).__name__)
    stop = max(ends[i] for i in chosen) + 1
    copied = real_clone(nn.ModuleList([link.module for link in links[:stop]]))
    names = [link.path.replace(".", "_") for link in links[:stop]]
    if len(set(names)) < len(names):
        raise ModelError(
            f"{type(net).__name__} runs a module twice, so it cannot become a chain of stages; use the feature "
            "extractor of the network's own library"
        )
    stages = OrderedDict(zip(names, copied.children(), strict=True))
    body = Backbone(stages, [names[ends[i]] for i in chosen], chosen, image, output)
    return body.train(net.training)


def _map_links(net: nn.Module, links: list[Link]) -> list[int]:
    """Return the links whose results are the maps: those that timm names, else the last of each resolution."""
    info = getattr(net, "feature_info", None)
    rows = info.info if isinstance(info, FeatureInfo) else info
    if isinstance(rows, list) and rows:
        position = {link.path: i for i, link in enumerate(links)}
        ends = [_last_link(str(row["module"]), position) for row in rows]
        if None not in ends:
            return [end for end in ends if end is not None]
    maps = [i for i, link in enumerate(links) if link.is_map]
    sizes = [links[i].shape[2:] for i in maps]
    return [i for k, i in enumerate(maps) if k + 1 == len(maps) or sizes[k + 1] != sizes[k]]


def _last_link(module: str, position: dict[str, int]) -> int | None:
    """Return the link of a module, or the last link inside it if the chain has opened the module."""
    inside = [i for path, i in position.items() if path == module or path.startswith(f"{module}.")]
    return max(inside, default=None)


def _check_indices(out_indices: Sequence[int] | None, count: int, name: str) -> list[int]:
    wanted = list(range(max(0, count - 4), count)) if out_indices is None else [int(i) for i in out_indices]
    found = sorted({i + count if i < 0 else i for i in wanted})
    if not found or found[0] < 0 or found[-1] >= count or len(found) < len(wanted):
        raise ModelError(f"{name} has {count} feature maps; out_indices={wanted} must be distinct indices of them")
    return found
