"""Models by name: ``torchvision/resnet50``, ``timm/efficientnet_b0``, ``module:factory``, ``FILE.py:factory``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from widthkit.errors import ModelError, Option, OptionError, close_matches, one_line
from widthkit.modules.merging import merge
from widthkit.modules.own_factory import is_own, own_factory, own_factory_takes
from widthkit.modules.structure import architecture, remember_image_size
from widthkit.modules.weights import load_weights


@dataclass(frozen=True)
class ModelName:
    """A name and the keyword arguments that make its factory build a certain model."""

    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Build the model; see :func:`create_model`."""
        return create_model(self.name, **self.kwargs)

    def outline(self, most: int | None = None) -> nn.Module:
        """Build the model on the meta device: without memory for its weights and without drawing random numbers.

        Args:
            most: Where the factory computes with real tensors, refuse to make one with more elements than this.

        Raises:
            ModelError: As :meth:`build`.

        >>> ModelName("torchvision/regnet_y_400mf").outline().fc.weight.device
        device(type='meta')
        """
        self._import()
        with torch.random.fork_rng(devices=[]):
            try:
                with torch.device("meta"):
                    return self.build()
            except ModelError:
                # Some factories compute the layout with tensors, which must be real.
                with _EmptyOnMeta(most):
                    return self.build()

    def with_meta_weights(self, most: int | None = None) -> nn.Module:
        """Build the model with its weights on the meta device, and with real tensors that its factory computes.

        Args:
            most: Refuse to make a real tensor with more elements than this.

        Raises:
            ModelError: As :meth:`build`.
        """
        self._import()
        with torch.random.fork_rng(devices=[]), _EmptyOnMeta(most):
            return self.build()

    def _import(self) -> None:
        """Import a user's own factory now: on the meta device, tensors of its module would have no values for good."""
        if is_own(self.name):
            own_factory(self.name)


class _EmptyOnMeta(TorchFunctionMode):
    """Puts tensors without values (``torch.empty``: the weights of layers) on the meta device.

    Args:
        most: Refuse to make a real tensor with more elements than this.
    """

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        self._most = most

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._most is not None and func in _MAKERS:
            size = func(*args, **{**kwargs, "device": "meta"}).numel()
            if size > self._most:
                raise ModelError(f"the model computes a tensor of {size} elements, more than its file can need")
        return func(*args, **({**kwargs, "device": "meta"} if func is torch.empty else kwargs))


_MAKERS = (torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.linspace, torch.eye)


def create_model(
    name: str,
    /,
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    reset_head: bool = False,
    merged: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Build a model by name.

    Args:
        name: ``torchvision/NAME``, ``timm/NAME``, or ``package.module:factory`` or ``FILE.py:factory`` for your own. A
            file's path is relative to the current folder, and files beside it can be imported while it is imported.
        pretrained: Load the library's default weights (needs a network or a filled cache).
        weights: Load trained weights from this file, as :func:`widthkit.modules.weights.load_weights` does.
        reset_head: Allow that the head in the file has another size; it keeps its fresh values then.
        merged: Merge blocks of several branches (RepVGG, MobileOne...) into plain layers.
        **kwargs: Passed to the factory, such as ``num_classes=10``.

    Raises:
        ModelError: If the name is unknown (with the close matches), the factory fails, or the weights do not fit.
        OptionError: If ``weights`` and ``pretrained`` are both given, or ``reset_head`` without ``weights``.

    >>> type(create_model("torchvision/resnet18", num_classes=10)).__name__
    'ResNet'
    """
    check_start(pretrained, weights, reset_head)
    factory = _factory(name, pretrained)
    try:
        with warnings.catch_warnings():
            # GoogLeNet and Inception warn that their default initialisation will change.
            warnings.filterwarnings("ignore", message="The default weight initialization", category=FutureWarning)
            model = factory(**kwargs)
    except Exception as error:
        shown = ", ".join(f"{k}={v!r}" for k, v in kwargs.items())
        raise ModelError(f"{name}({shown}) cannot be built: {type(error).__name__}: {one_line(error, 200)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned {type(model).__name__}, not an nn.Module")
    if name.startswith("torchvision/"):
        remember_image_size(model, _image_size(name.partition("/")[2]))
    if weights is not None:
        load_weights(model, weights, reset_head=reset_head)
    return merge(model) if merged else model


def check_start(pretrained: bool, weights: str | Path | None, reset_head: bool) -> None:
    """Refuse two sources of weights at once, and a head that is reset without a file.

    Raises:
        OptionError: If so.
    """
    if pretrained and weights is not None:
        raise OptionError(Option("pretrained", True), " and ", Option("weights"), " exclude each other; choose one")
    if reset_head and weights is None:
        raise OptionError(Option("reset_head", True), " needs ", Option("weights"), ", the file whose head differs")


def takes_argument(name: str, argument: str) -> bool:
    """Whether a model's factory takes a keyword argument; those of torchvision and timm are given everything.

    Args:
        name: As in :func:`create_model`.
        argument: The keyword.

    Raises:
        ModelError: If the name is that of a user's own factory, and there is none.
    """
    return not is_own(name) or own_factory_takes(name, argument)


def _image_size(name: str) -> int | None:
    """Return the side length of the images that torchvision's default weights of a classifier were trained on."""
    from torchvision import models

    weights = models.get_model_weights(name)
    transforms = getattr(getattr(weights, "DEFAULT", None), "transforms", None)
    size = getattr(transforms, "keywords", {}).get("crop_size")
    return size if isinstance(size, int) else None


def _factory(name: str, pretrained: bool) -> Callable[..., Any]:
    if is_own(name):
        target = own_factory(name)
        return (lambda **kwargs: target(pretrained=True, **kwargs)) if pretrained else target
    source, slash, rest = name.partition("/")
    if slash and source == "torchvision":
        return _torchvision_factory(rest, pretrained)
    if slash and source == "timm":
        return _timm_factory(rest, pretrained)
    raise ModelError(
        f"unknown model '{name}': write torchvision/NAME, timm/NAME, package.module:factory or FILE.py:factory"
    )


def _torchvision_factory(name: str, pretrained: bool) -> Callable[..., Any]:
    from torchvision import models

    if name not in models.list_models():
        raise ModelError(f"unknown model 'torchvision/{name}': {close_matches(name, models.list_models())}")
    builder = models.get_model_builder(name)
    if pretrained:
        return lambda **kwargs: builder(weights="DEFAULT", **kwargs)
    # Detection and segmentation models download backbone weights by default.
    no_download = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    return lambda **kwargs: builder(weights=None, **{**no_download, **kwargs})


def _timm_factory(name: str, pretrained: bool) -> Callable[..., Any]:
    import timm

    if not timm.is_model(name):
        raise ModelError(f"unknown model 'timm/{name}': {close_matches(name.split('.')[0], timm.list_models())}")
    return lambda **kwargs: timm.create_model(name, pretrained=pretrained, **kwargs)


def input_channels(model: nn.Module) -> int:
    """Return the channels of the images a model expects: those of its first 2-D convolution, three without one."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return int(module.in_channels)
    return 3


def likely_names(model: nn.Module) -> Iterator[ModelName]:
    """Yield the names and arguments under which a model may have been built, likely ones first."""
    kwargs: dict[str, Any] = {}
    classes = _num_classes(model)
    if classes is not None:
        kwargs["num_classes"] = classes
    channels = input_channels(model)
    name = architecture(model)
    if name is not None:
        yield ModelName(f"timm/{name}", kwargs)
        yield ModelName(f"timm/{name}", {**kwargs, "in_chans": channels})
        yield ModelName(f"timm/{name}", {"features_only": True})
        yield ModelName(f"timm/{name}", {**kwargs, "merged": True})
    # Arguments of GoogLeNet and Inception, which their pretrained weights set as well.
    flags: dict[str, Any] = {
        flag: vars(model)[flag] for flag in ("aux_logits", "transform_input") if flag in vars(model)
    }
    if type(model).__module__.startswith("torchvision."):
        for builder in _torchvision_builders(type(model)):
            yield ModelName(f"torchvision/{builder}", kwargs)
            if not kwargs or type(model).__module__.count(".") > 2:
                # Models in subpackages (detection, flow) may count or name their classes differently.
                yield ModelName(f"torchvision/{builder}", {})
            if flags:
                yield ModelName(f"torchvision/{builder}", {**kwargs, **flags})


def _torchvision_builders(cls: type) -> list[str]:
    """List the builders whose return annotation names the class."""
    from torchvision import models

    found = []
    for name in models.list_models():
        returns = models.get_model_builder(name).__annotations__.get("return")
        if returns is cls or returns == cls.__name__:
            found.append(name)
    return found


def _num_classes(model: nn.Module) -> int | None:
    value = getattr(model, "num_classes", None)
    if isinstance(value, int):
        return value
    last = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    if not last:
        return None
    return last[-1].out_features if isinstance(last[-1], nn.Linear) else last[-1].out_channels
