"""Check whether two networks compute the same: the largest difference of their outputs, with a stated tolerance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from widthkit.errors import ExportError, one_line
from widthkit.modules.clone import clone_with
from widthkit.trace.inputs import Inputs, Keywords, as_inputs, batch_size, float_dtype, likely_inputs
from widthkit.train.modes import model_device, training_flags

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.08}
"""Largest difference allowed, as a share of the largest output.

In float32 and float64 only the order of sums may change. Rounding grows with the length of a sum (thousands of terms)
and with the depth: to about 1e3 spacings of float32 and 5e5 of float64. The half types round every activation: after a
hundred layers that is about 10 spacings (1e-3 for float16, 8e-3 for bfloat16). See also :func:`rounding_share`.
"""
_ACTIVATIONS_FACTOR = 4.0
"""Rounding every activation moves the outputs at most this many times as far as rounding weights and inputs."""
_LARGEST_TOLERANCE = 0.5
"""A difference of more than half the largest output is never accepted."""


@dataclass(frozen=True)
class Comparison:
    """How much the outputs of two networks differ on one input.

    Args:
        batch: Number of examples in the input.
        largest_difference: Largest absolute difference of an output value.
        largest_output: Largest absolute output value of the reference.
        tolerance: Largest difference allowed, as a share of ``largest_output``.
    """

    batch: int
    largest_difference: float
    largest_output: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.largest_difference <= self.tolerance * self.largest_output

    def record(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return asdict(self)


def tolerance(dtype: torch.dtype, share: float = 0.0) -> float:
    """Return the largest difference allowed, as a share of the largest output.

    Args:
        dtype: Type of the computation.
        share: The effect of rounding only weights and inputs to this type (:func:`rounding_share`). Rounding every
            activation too has a few times that effect, so that much is allowed, up to half of the largest output.
    """
    usual = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
    return max(usual, min(_ACTIVATIONS_FACTOR * share, _LARGEST_TOLERANCE))


def rounding_share(net: nn.Module, inputs: Inputs, dtype: torch.dtype) -> float:
    """Return how far a network's outputs move, as a share of the largest, if weights and inputs are rounded to a type.

    The computation itself stays in the network's own type. So the share measures how sensitive the network is to
    rounding, not how well a device computes in the other type.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(net.weight, 1 + 2**-8)  # the nearest bfloat16 is 1
    >>> round(rounding_share(net, (torch.ones(1, 1),), torch.bfloat16) * 257, 6)
    1.0
    """
    own = float_dtype(net)
    if dtype.itemsize >= own.itemsize:
        return 0.0

    def rounded(t: Tensor) -> Tensor:
        return t.to(dtype).to(own) if t.is_floating_point() else t.detach().clone()

    twin = clone_with(net, lambda _, t: rounded(t.detach()))
    got = outputs(twin, tree_map_only(Tensor, rounded, inputs))
    found = compare(outputs(net, inputs), got, 0.0, batch_size(inputs))
    return found.largest_difference / (found.largest_output or 1.0)


def compare(expected: Any, got: Any, allowed: float, batch: int) -> Comparison:
    """Compare two structures of tensors.

    Args:
        expected: Outputs of the reference.
        got: Outputs to compare; a flat list or the same structure.
        allowed: Largest difference allowed, as a share of the largest output.
        batch: Number of examples, for the record.

    Raises:
        ExportError: If the outputs differ in number or shape.

    >>> compare(torch.ones(2, 3), torch.full((2, 3), 1.5), 1e-4, 2).largest_difference
    0.5
    """
    left = [t for t in tree_leaves(expected) if isinstance(t, Tensor)]
    right = [t for t in tree_leaves(got) if isinstance(t, Tensor)]
    shapes = [tuple(t.shape) for t in left], [tuple(t.shape) for t in right]
    if shapes[0] != shapes[1]:
        raise ExportError(
            f"the exported network returns outputs of shapes {shapes[1]}, its reference {shapes[0]}; "
            "export it with example_inputs of the shapes that it is used with"
        )
    pairs = [(a.detach().cpu().double(), b.detach().cpu().double()) for a, b in zip(left, right, strict=True)]
    differences = [float((a - b).abs().max()) for a, b in pairs if a.numel()]
    # Python's max() ignores a NaN that is not the first value; a sum does not.
    largest = max(differences, default=0.0) if sum(differences) == sum(differences) else float("nan")
    scale = max((float(a.abs().max()) for a, _ in pairs if a.numel()), default=0.0)
    return Comparison(batch, largest, scale, allowed)


def check_same(
    reference: nn.Module, net: nn.Module, example_inputs: Any = None, *, name: str = "the exported network"
) -> Comparison:
    """Compare two networks in eval mode on one input.

    Args:
        reference: The network with the right outputs, such as a supernet at the exported widths.
        net: The network to check.
        example_inputs: As in :func:`widthkit.trace`.
        name: Name of ``net`` in the error message.

    Raises:
        ExportError: If they differ by more than the tolerance.

    >>> layer = nn.Linear(3, 2)
    >>> check_same(layer, layer, (4, 3)).largest_difference
    0.0
    """
    inputs = usable_inputs(net, example_inputs)
    allowed = tolerance(float_dtype(net))
    with full_float32(model_device(net)):
        found = compare(outputs(reference, inputs), outputs(net, inputs), allowed, batch_size(inputs))
    refuse_mismatch([found], name)
    return found


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Keep CUDA's convolutions and matrix products in full float32 while results are compared.

    By default cuDNN rounds the inputs of float32 convolutions to TF32. That moves results by 1e-3, ten times the
    tolerance of float32, although nothing is wrong. The settings are restored. On a CPU nothing is changed.
    """
    if device.type != "cuda":
        yield
        return
    cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    kept = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    with cudnn.flags(**kept, allow_tf32=False):
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


def refuse_mismatch(found: Sequence[Comparison], name: str) -> None:
    """Raise an error for the first comparison that failed.

    Raises:
        ExportError: With the numbers of that comparison.
    """
    for one in found:
        if not one.passed:
            raise ExportError(
                f"{name} differs from the reference by {one.largest_difference:.3g} on a batch of {one.batch} (largest "
                f"output {one.largest_output:.3g}, allowed {one.tolerance:g} of it); nothing was written. "
                "Export with a wider dtype, or leave this format out"
            )


def usable_inputs(net: nn.Module, example_inputs: Any) -> Inputs:
    """Return the given example inputs, or the first of the usual ones on which the network runs.

    Raises:
        ExportError: If it runs on none of them; with the last failure.
    """
    if example_inputs is not None:
        return as_inputs(example_inputs, float_dtype(net))
    failure = "no example input is known"
    for inputs in likely_inputs(net):
        try:
            outputs(net, inputs)
            return inputs
        except Exception as error:  # a model may raise anything on an image size that it does not take
            failure = one_line(error)
    raise ExportError(f"{type(net).__name__} runs on no usual image size ({failure}); pass example_inputs=")


def outputs(net: nn.Module, inputs: Inputs) -> Any:
    """Run a network in eval mode without gradients, on its own device; its training flags are restored."""
    device = model_device(net)
    args, kwargs = call_arguments(tree_map_only(Tensor, lambda t: t.to(device), inputs))
    with training_flags(net), torch.no_grad():
        net.eval()
        return net(*args, **kwargs)


def call_arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split example inputs into positional and keyword arguments."""
    if len(inputs) == 1 and isinstance(inputs[0], Keywords):
        return (), dict(inputs[0])
    return inputs, {}


def resized(inputs: Inputs, batch: int) -> Inputs:
    """Return inputs of another batch size: examples are dropped, or repeated and every second copy mirrored.

    >>> resized((torch.tensor([[1, 2]]),), 2)[0].tolist()
    [[1, 2], [2, 1]]
    """
    own = batch_size(inputs)

    def change(t: Tensor) -> Tensor:
        if not t.ndim or t.shape[0] != own:
            return t
        more = [t.flip(-1) if i % 2 else t for i in range(-(-batch // own))]
        return torch.cat(more)[:batch]

    changed: Inputs = tree_map_only(Tensor, change, inputs)
    return changed
