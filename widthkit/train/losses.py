"""Losses and scores as pure functions of outputs and targets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widthkit.errors import DataError, ModelError, OptionError

Loss = Callable[..., Tensor]
"""A criterion: ``loss(outputs, targets)``, or ``loss(outputs, targets, inputs=inputs)``; see :func:`binding`."""


def binding(loss: Loss) -> Callable[[Any], Loss]:
    """Return how a criterion becomes one of outputs and targets, once the inputs of a batch are known.

    A criterion gets the inputs if it has a parameter named ``inputs`` that is neither its first nor its second
    positional one, as some call their outputs ``inputs``. The signature is read here, not for every batch.

    Args:
        loss: A function, an object with ``__call__``, or a module.

    Returns:
        A function of a batch's inputs. It returns the criterion for that batch, ``(outputs, targets) -> scalar``:
        ``loss`` itself if it takes no inputs.

    >>> def weighted(outputs, targets, inputs):
    ...     return ((outputs - targets) * inputs).mean()
    >>> binding(weighted)(torch.tensor([0.0, 2.0]))(torch.ones(2), torch.zeros(2))
    tensor(1.)
    >>> binding(F.mse_loss)(torch.ones(2)) is F.mse_loss
    True
    """
    if not _takes_inputs(loss):
        return lambda inputs: loss
    return lambda inputs: partial(loss, inputs=inputs)


def _takes_inputs(loss: Loss) -> bool:
    try:
        parameters = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters
    except ValueError:
        return False  # Some functions written in C have no signature; none of them knows inputs.
    if "inputs" not in parameters:
        return False
    kind, place = parameters["inputs"].kind, list(parameters).index("inputs")
    return kind is inspect.Parameter.KEYWORD_ONLY or (kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and place > 1)


def is_cross_entropy(loss: Any) -> bool:
    """Whether a criterion is cross entropy: this module's, torch's function or torch's module.

    >>> is_cross_entropy(cross_entropy(0.1)), is_cross_entropy(nn.MSELoss())
    (True, False)
    """
    return loss is F.cross_entropy or isinstance(loss, (CrossEntropy, nn.CrossEntropyLoss))


@dataclass(frozen=True)
class CrossEntropy:
    """Cross entropy with label smoothing, averaged over the batch; see :func:`cross_entropy`."""

    smoothing: float

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the loss, a scalar in nats."""
        logits = main_output(outputs)
        _check_classes(logits, targets)
        targets = targets if targets.is_floating_point() else targets.long()
        return F.cross_entropy(at_least_single(logits), targets, label_smoothing=self.smoothing)

    def __repr__(self) -> str:
        return f"cross_entropy({self.smoothing})"


def cross_entropy(smoothing: float = 0.0) -> CrossEntropy:
    """Make the default criterion: cross entropy with label smoothing, averaged over the batch.

    The criterion takes ``outputs`` ``(N, C)`` or ``(N, C, ...)`` (or a tuple, mapping or object that holds such
    logits, see :func:`main_output`) and ``targets``: class indices ``(N)`` or ``(N, ...)``, or class probabilities
    of the outputs' shape.

    Args:
        smoothing: Share of the target's probability that is spread evenly over all classes, in ``[0, 1)``.

    Returns:
        A function ``(outputs, targets) -> scalar tensor``, in nats.

    Raises:
        OptionError: If ``smoothing`` is out of range.

    >>> criterion = cross_entropy()
    >>> round(float(criterion(torch.zeros(4, 10), torch.tensor([1, 2, 3, 4]))), 4)
    2.3026
    """
    if not 0 <= smoothing < 1:
        raise OptionError(f"label smoothing {smoothing} is outside [0, 1); 0.1 is usual.")
    return CrossEntropy(smoothing)


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross entropy against a teacher's soft output: the in-place distillation loss of AutoSlim, section 3.

    Args:
        logits: ``(N, C)`` or ``(N, C, ...)``, the student's.
        teacher_logits: The same shape; no gradient flows into them.

    Returns:
        The mean over the batch (and over positions, if any) of ``-sum(softmax(teacher) * log_softmax(student))``,
        in nats.

    Raises:
        ModelError: If the shapes differ.

    >>> even = torch.zeros(3, 4)
    >>> round(float(soft_cross_entropy(even, even)), 4)  # log 4
    1.3863
    """
    if logits.shape != teacher_logits.shape or logits.ndim < 2:
        raise ModelError(
            f"distillation needs logits (N, C, ...) of one shape, got {tuple(logits.shape)} for the student and "
            f"{tuple(teacher_logits.shape)} for the teacher; use a strategy without distillation."
        )
    teacher = at_least_single(teacher_logits.detach()).softmax(dim=1)
    return -(teacher * at_least_single(logits).log_softmax(dim=1)).sum(dim=1).mean()


def accuracy(outputs: Any, targets: Any) -> float | None:
    """Share of samples whose largest logit is the target's class (top-1), in ``[0, 1]``.

    Args:
        outputs: Logits ``(N, C)``, or something :func:`main_output` finds them in.
        targets: Class indices ``(N)``.

    Returns:
        The share, or ``None`` if these are not class logits and class indices, or if there are no samples.

    >>> accuracy(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1]))
    0.5
    >>> accuracy(torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8)) is None
    True
    """
    hits = count_correct(outputs, targets)
    if hits is None or len(targets) == 0:
        return None
    return float(hits) / len(targets)


def count_correct(outputs: Any, targets: Any, loss: Any = None) -> Tensor | None:
    """Count the top-1 hits without waiting for the device.

    Args:
        outputs: Logits ``(N, C)``, or something :func:`main_output` finds them in.
        targets: Class indices ``(N)``.
        loss: The criterion. With cross entropy, targets may also be class probabilities ``(N, C)``; a hit is then their
            likeliest class.

    Returns:
        A scalar tensor on the outputs' device, or ``None`` if these are not class logits and class indices.

    >>> count_correct(torch.eye(3), torch.tensor([0, 1, 1]))
    tensor(2)
    """
    logits = find_logits(outputs)
    if is_cross_entropy(loss) and isinstance(targets, Tensor) and targets.ndim == 2 and targets.is_floating_point():
        targets = targets.argmax(dim=1)
    if logits is None or not isinstance(targets, Tensor) or logits.ndim != 2 or targets.ndim != 1:
        return None
    if len(logits) != len(targets) or logits.shape[1] == 0 or targets.is_floating_point():
        return None
    return (logits.detach().argmax(dim=1) == targets).sum()


def main_output(outputs: Any) -> Tensor:
    """Find the logits in what a model returns: a tensor, a tuple's first, ``.logits``, ``["logits"]``, ``["out"]``.

    Raises:
        ModelError: If there is no tensor in any of these places.

    >>> main_output({"out": torch.zeros(1), "aux": torch.ones(1)})
    tensor([0.])
    """
    found = find_logits(outputs)
    if found is None:
        raise ModelError(f"cannot find logits in outputs of type {type(outputs).__name__}; pass loss=your_function.")
    return found


def find_logits(outputs: Any) -> Tensor | None:
    """Find the logits as :func:`main_output` does; ``None`` if there are none."""
    if isinstance(outputs, Mapping):
        outputs = outputs.get("logits", outputs.get("out"))
    elif not isinstance(outputs, Tensor):
        outputs = getattr(outputs, "logits", outputs)
    if isinstance(outputs, (tuple, list)) and outputs:
        outputs = outputs[0]
    return outputs if isinstance(outputs, Tensor) else None


def _check_classes(logits: Tensor, targets: Tensor) -> None:
    """Refuse what would end in an index error or, on a GPU, in a device assertion that kills the process."""
    if logits.ndim < 2 or not isinstance(targets, Tensor):
        raise ModelError(
            f"cross entropy needs logits (N, C, ...) and class indices, got outputs {tuple(logits.shape)} and targets "
            f"of type {type(targets).__name__}; pass loss=your_function."
        )
    # Reading the range would make a GPU wait in every step, so only the CPU's labels are checked.
    if targets.is_floating_point() or targets.device.type != "cpu" or targets.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(targets))
    if high >= logits.shape[1] or (low < 0 and low != -100):
        wrong, classes = (high if high >= logits.shape[1] else low), logits.shape[1]
        raise DataError(f"label {wrong} does not fit the model's {classes} classes; set the model's num_classes.")


def at_least_single(values: Tensor) -> Tensor:
    """Return values in single precision where they are in half, which is too coarse for exponentials and squares."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
