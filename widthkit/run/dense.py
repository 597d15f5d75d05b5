"""The dense model of a run, fresh or with the trained weights that the run starts from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from widthkit.errors import Option, OptionError
from widthkit.modules.merging import merge
from widthkit.modules.models import create_model, takes_argument
from widthkit.modules.weights import load_weights
from widthkit.run.config import RunConfig
from widthkit.train import DataSplits
from widthkit.train.modes import training_flags


def factory_options(config: RunConfig, classes: int) -> dict[str, Any]:
    """Return the arguments of the model's factory; one that takes no ``num_classes`` gets none.

    Args:
        config: Names the model.
        classes: How many classes the model tells apart.
    """
    known = {"num_classes": classes} if takes_argument(config.model, "num_classes") else {}
    return {**known, **config.model_options}


def fresh_model(config: RunConfig, data: DataSplits, seed: int, *, trained: bool = False) -> nn.Module:
    """Build the dense model for the data's classes, with weights drawn from a seed.

    Args:
        config: Names the model.
        data: Its classes.
        seed: Draws the weights.
        trained: Load the trained weights that the run starts from, if any.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model(config.model, **factory_options(config, data.num_classes))
    if trained:
        load_trained(model, config)
    return model


def plain_model(config: RunConfig, data: DataSplits, seed: int, *, trained: bool = False) -> nn.Module:
    """Build the model that widths are taken from: the dense model, with its blocks merged where they merge.

    Args:
        config: Names the model.
        data: Its classes.
        seed: Draws the weights.
        trained: Load the trained weights that the run starts from, if any.
    """
    model = fresh_model(config, data, seed, trained=trained)
    return merge(model).train() if config.merges else model


def load_trained(model: nn.Module, config: RunConfig) -> tuple[str, ...]:
    """Load the trained weights that a run starts from, if any: those of a file, or the library's.

    Args:
        model: The dense model.
        config: Names the weights.

    Returns:
        The names of the tensors that keep their fresh values, such as a head's.
    """
    if config.weights is not None:
        return load_weights(model, config.weights, reset_head=config.reset_head).reset
    if config.pretrained:
        return tuple(load_matching(model, create_model(config.model, pretrained=True, **config.model_options)))
    return ()


def load_matching(model: nn.Module, pretrained: nn.Module) -> list[str]:
    """Copy every tensor whose name and shape agree; return the names of those that stay as they are."""
    source = pretrained.state_dict()
    own = model.state_dict()
    fitting = {n: t for n, t in source.items() if n in own and own[n].shape == t.shape}
    model.load_state_dict(fitting, strict=False)
    return sorted(set(own) - set(fitting))


def input_shape(data: DataSplits, batch: int = 1) -> tuple[int, ...]:
    """Return the shape of a batch of the data's images."""
    return (batch, *data.train[0][0].shape)


def has_trained_weights(config: RunConfig) -> bool:
    """Whether a run starts from trained weights."""
    return config.pretrained or config.weights is not None


def check_outputs(model: nn.Module, config: RunConfig, data: DataSplits) -> None:
    """Refuse a classifier that gives another number of outputs than the data have classes.

    Args:
        model: The dense model.
        config: Names the model.
        data: Its classes.

    Raises:
        OptionError: If so.
    """
    with torch.no_grad(), training_flags(model):
        outputs = model.eval()(torch.zeros(input_shape(data)))
    if isinstance(outputs, Tensor) and outputs.ndim == 2 and outputs.shape[1] != data.num_classes:
        taken = takes_argument(config.model, "num_classes")
        raise OptionError(
            f"{config.model} gives {outputs.shape[1]} outputs, {config.data} has {data.num_classes} classes; ",
            "correct " if taken else "let its factory take num_classes, or set the classes by ",
            Option("model_options"),
        )
