"""What a network learns from another one, as pure functions: soft targets and attention maps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from widthkit.errors import ModelError, Option
from widthkit.train.losses import at_least_single, find_logits

Shape = tuple[int, ...]


def soft_target_loss(outputs: Any, teacher_outputs: Any, temperature: float) -> Tensor:
    """Divergence of a network's softened class probabilities from a teacher's (Hinton et al. 2015, section 2).

    Args:
        outputs: Logits ``(N, C)`` or ``(N, C, ...)``, or something :func:`~widthkit.train.losses.main_output` finds
            them in.
        teacher_outputs: The teacher's, of the same shape; no gradient flows into them.
        temperature: Divides all logits.

    Returns:
        ``temperature**2 * KL(softmax(teacher / temperature) || softmax(student / temperature))``, the mean over the
        batch (and over positions, if any), in nats. The square keeps gradients of soft and hard targets in proportion.

    Raises:
        ModelError: If these are not logits of at least two classes and of one shape.

    >>> import torch
    >>> sure, even = torch.tensor([[0.0, 50.0]]), torch.zeros(1, 2)
    >>> round(float(soft_target_loss(even, sure, 1.0)), 4)  # log 2
    0.6931
    """
    student, teacher = _logits(outputs, "the network"), _logits(teacher_outputs, "the teacher")
    if student.shape != teacher.shape or student.ndim < 2 or student.shape[1] < 2:
        raise ModelError(
            "soft targets need logits (N, C, ...) of one shape and at least two classes, not ",
            f"{tuple(student.shape)} of the network and {tuple(teacher.shape)} of the teacher; take a teacher of the "
            "same classes, or set ",
            Option("teacher_weight", 0),
        )
    expected = (at_least_single(teacher.detach()) / temperature).log_softmax(dim=1)
    found = (at_least_single(student) / temperature).log_softmax(dim=1)
    divergence = F.kl_div(found, expected, reduction="none", log_target=True).sum(dim=1).mean()
    return divergence * temperature**2


def check_soft_targets(outputs: Any, teacher_outputs: Any, targets: Any) -> None:
    """Refuse a task whose outputs are no class logits, as its targets show, and a teacher that is broken.

    Args:
        outputs: Logits, or something that has them.
        teacher_outputs: The teacher's.
        targets: Class indices, class probabilities of the logits' shape, or something that is no tensor.

    Raises:
        ModelError: If the targets are real numbers, but not class probabilities, or the teacher's logits not finite.
    """
    if not bool(_logits(teacher_outputs, "the teacher").isfinite().all()):
        raise ModelError("the teacher's outputs are not finite; take another ", Option("teacher"))
    if not isinstance(targets, Tensor) or not targets.is_floating_point():
        return
    sums = targets.sum(dim=1) if targets.shape == _logits(outputs, "the network").shape else None
    # Mixed labels are in single precision or less.
    if sums is None or not bool(((sums - 1).abs() < 1e-2).all()):
        raise ModelError(
            "soft targets need a task of class labels or class probabilities, and the targets are other numbers; "
            "leave out ",
            Option("teacher"),
            " or set ",
            Option("teacher_weight", 0),
        )


def attention_map(features: Tensor) -> Tensor:
    """Where a feature map is large: squared activations, summed over channels, of norm 1 per sample.

    Args:
        features: ``(N, C, H, W)``, of any number of channels.

    Returns:
        ``(N, H * W)``.

    >>> import torch
    >>> attention_map(torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]]))
    tensor([[1., 0.]])
    """
    return F.normalize(at_least_single(features).square().sum(dim=1).flatten(1))


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the mean squared difference of attention maps (Zagoruyko and Komodakis 2017, Eq. 2).

    The difference is squared, as in the authors' code: the norm itself has no gradient where the maps are equal. Their
    weight is 1000.

    Args:
        student: ``(N, positions)``, as :func:`attention_map` returns it.
        teacher: The same of the teacher.

    Returns:
        The mean over samples and positions.
    """
    return (student - teacher).square().mean() / 2


def matching_places(student: dict[str, Shape], teacher: dict[str, Shape], sizes: Iterable[Shape]) -> list[str]:
    """Choose where feature maps are matched: of every spatial size the last module that both networks have.

    Args:
        student: Name of every module -> shape of what it returned, in the order of the run.
        teacher: The same of the teacher.
        sizes: The pairs ``(H, W)`` that convolutions return. A tensor of four dims and another size is no map
            ``(N, C, H, W)``: channels may come last, or it may be a matrix of attention between tokens.

    Returns:
        Names of modules, in the order of the student's run. A map of one position says nothing and is left out.

    >>> maps = {"a": (2, 8, 4, 4), "b": (2, 8, 4, 4), "c": (2, 8, 2, 2), "pool": (2, 8, 1, 1)}
    >>> matching_places(maps, {**maps, "c": (2, 9, 2, 2)}, [(4, 4), (2, 2), (1, 1)])
    ['b', 'c']
    """
    wanted = {size for size in sizes if math.prod(size) > 1}
    last = {
        shape[2:]: name
        for name, shape in student.items()
        if name in teacher and len(shape) == len(teacher[name]) == 4
        if shape[2:] == teacher[name][2:] and shape[2:] in wanted
    }
    return [name for name in student if name in last.values()]


def _logits(outputs: Any, whose: str) -> Tensor:
    found = find_logits(outputs)
    if found is None or not found.is_floating_point():
        raise ModelError(
            f"soft targets need logits, and there are none in outputs of {whose} of type {type(outputs).__name__}; "
            "set ",
            Option("teacher_weight", 0),
        )
    return found
