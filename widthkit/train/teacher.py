"""Train a network with a teacher: what the teacher says of a batch is part of every loss on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from widthkit.errors import ModelError, Option, OptionError, one_line
from widthkit.modules.clone import real_clone
from widthkit.train.distillation import (
    attention_loss,
    attention_map,
    check_soft_targets,
    matching_places,
    soft_target_loss,
)
from widthkit.train.modes import call_model, training_flags
from widthkit.train.rng import seeded
from widthkit.train.settings import TrainSettings
from widthkit.train.step import StepContext, TrainsModel

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
_NETWORK = ""
"""The name of a whole network among its modules."""


class Teacher:
    """A copy of a trained network, from which another network learns.

    The loss of an output is ``(1 - w) * loss + w * soft + f * maps``: ``w`` is the setting ``teacher_weight``, ``soft``
    the :func:`~widthkit.train.distillation.soft_target_loss`, ``f`` the setting ``feature_weight``, ``maps`` the sum of
    :func:`~widthkit.train.distillation.attention_loss` over the places that both networks have.

    Args:
        teacher: The trained network; it stays as it is.
        net: The network that learns.
        settings: Weights and temperature.
        device: Where to train.

    Raises:
        OptionError: If the teacher is no module.
        ModelError: If it cannot be copied.
    """

    def __init__(self, teacher: nn.Module, net: nn.Module, settings: TrainSettings, device: torch.device) -> None:
        if not isinstance(teacher, nn.Module):
            raise OptionError(Option("teacher"), f" must be a module, not {type(teacher).__name__}; load it first.")
        self.net, self.settings = net, settings
        self.model = real_clone(teacher).requires_grad_(False).eval().to(device)
        self._places: list[str] | None = None

    def leading(self, train_step: Callable[[StepContext], Tensor]) -> Callable[[StepContext], Tensor]:
        """Return a training step that learns from the teacher; the step itself if no weight asks for that."""
        if not self.settings.teacher_weight and not self.settings.feature_weight:
            return train_step
        return partial(self._lead, train_step)

    def _lead(self, train_step: Callable[[StepContext], Tensor], step: StepContext) -> Tensor:
        if self._places is None:
            self._places = self._meet(step)
        with torch.no_grad(), step.amp(), _results(_holder(self.model), self._places) as found:
            said = _run(self.model, step.inputs)
        maps = {place: attention_map(found[place]) for place in self._places}
        with _results(_holder(self.net), [_NETWORK, *self._places] if maps else []) as ours:
            lesson = _Lesson(self.settings, said, maps, ours)
            step.teacher = lesson
            loss = train_step(step)
        if not lesson.heard:
            raise ModelError(
                f"the training step of {type(self.net).__name__} does not learn from a teacher: let it compute "
                "gradients of step.with_teacher(outputs, loss), or leave out ",
                Option("teacher"),
            )
        return loss

    def _meet(self, step: StepContext) -> list[str]:
        """Run both networks on a batch, before anything changes, and return where feature maps are matched."""
        ours: dict[str, tuple[int, ...]] = {}
        theirs: dict[str, tuple[int, ...]] = {}
        with torch.no_grad(), seeded(0), training_flags(self.net), step.amp():
            self.net.eval()
            with _shapes(_holder(self.model), theirs):
                said = _first_run(self.model, step.inputs, "the teacher")
            with _shapes(_holder(self.net), ours):
                outputs = _first_run(self.net, step.inputs, type(self.net).__name__)
            if self.settings.teacher_weight:
                soft_target_loss(outputs, said, self.settings.temperature)
                check_soft_targets(outputs, said, step.targets)
        layers = {name for name, module in _holder(self.net).named_modules() if isinstance(module, _CONVOLUTIONS)}
        sizes = [shape[2:] for name, shape in ours.items() if name in layers]
        places = matching_places(ours, theirs, sizes) if self.settings.feature_weight else []
        if self.settings.feature_weight and not places:
            raise ModelError(
                "no module of the network and the teacher's module of that name return feature maps (N, C, H, W) of "
                "one height and width; take a teacher with the same module names, or set ",
                Option("feature_weight", 0),
            )
        return places


class _Lesson:
    """What a teacher says of one batch.

    Args:
        settings: Weights and temperature.
        said: The teacher's outputs.
        maps: Place -> the teacher's attention map.
        ours: Place -> what the network's module returned last.
    """

    def __init__(self, settings: TrainSettings, said: Any, maps: dict[str, Tensor], ours: dict[str, Any]) -> None:
        self.settings, self.said, self.maps, self.ours = settings, said, maps, ours
        self.heard = False

    def __call__(self, outputs: Any, loss: Tensor) -> Tensor:
        """Mix the loss of outputs with the teacher's part."""
        self.heard = True
        weight = self.settings.teacher_weight
        if weight:
            loss = (1 - weight) * loss + weight * soft_target_loss(outputs, self.said, self.settings.temperature)
        if self.maps:
            loss = loss + self.settings.feature_weight * self._attention(outputs)
        return loss

    def _attention(self, outputs: Any) -> Tensor:
        if self.ours.get(_NETWORK) is not outputs:
            raise ModelError(
                "feature maps are known of the last run only: let the training step call step.with_teacher on what "
                "the network returned, before it runs again, or set ",
                Option("feature_weight", 0),
            )
        return torch.stack([self._distance(place) for place in self.maps]).sum()

    def _distance(self, place: str) -> Tensor:
        found, expected = attention_map(self.ours[place]), self.maps[place]
        if found.shape != expected.shape:
            raise ModelError(
                f"{place} has feature maps {tuple(self.ours[place].shape)}, of another height and width than the "
                "teacher's; set ",
                Option("feature_weight", 0),
            )
        return attention_loss(found, expected)


def _run(model: nn.Module, inputs: Any) -> Any:
    """Run a model on a copy of the inputs: what it writes into them must not reach the network that learns."""
    return call_model(model, tree_map_only(Tensor, Tensor.clone, inputs))


def _first_run(model: nn.Module, inputs: Any, who: str) -> Any:
    try:
        return _run(model, inputs)
    except Exception as error:
        raise ModelError(
            f"{who} cannot run on a batch in eval mode ({type(error).__name__}: {one_line(error)}); the teacher and "
            "the network take the same inputs"
        ) from error


def _holder(net: nn.Module) -> nn.Module:
    """Return the module whose modules have the names of the model that a user gave."""
    return net.model if isinstance(net, TrainsModel) else net


@contextmanager
def _watched(model: nn.Module, names: Iterable[str], see: Callable[[str, Any], None]) -> Iterator[None]:
    """Call ``see(name, outputs)`` whenever one of these modules has run."""
    hooks = [model.get_submodule(name).register_forward_hook(partial(_tell, see, name)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tell(see: Callable[[str, Any], None], name: str, module: nn.Module, args: Any, outputs: Any) -> None:
    see(name, outputs)


@contextmanager
def _results(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Keep what modules return; of several runs the last."""
    found: dict[str, Any] = {}
    with _watched(model, names, found.__setitem__):
        yield found


@contextmanager
def _shapes(model: nn.Module, found: dict[str, tuple[int, ...]]) -> Iterator[None]:
    """Collect the shapes of what all modules inside a model return, in the order of their last runs."""

    def see(name: str, outputs: Any) -> None:
        found.pop(name, None)
        if isinstance(outputs, Tensor) and outputs.is_floating_point():
            found[name] = tuple(outputs.shape)

    with _watched(model, [name for name, _ in model.named_modules() if name], see):
        yield
