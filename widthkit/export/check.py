"""Whether two networks compute the same: the largest difference of their outputs, against a stated tolerance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from widthkit.errors import ExportError
from widthkit.modules.clone import clone_with
from widthkit.trace.inputs import Inputs, Keywords, as_inputs, batch_size, float_dtype, likely_inputs
from widthkit.train.modes import model_device, training_flags

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.08}
"""Largest difference allowed, as a share of the largest output.

In float32 and float64 only the order of sums may change: rounding grows with the length of a sum (thousands of terms)
and the depth, to some 1e3 and 5e5 spacings of the type. The half types round every activation: some 10 spacings
(1e-3 for float16, 8e-3 for bfloat16) remain after a hundred layers; see also :func:`rounding_share`.
"""
_WEIGHTS_TO_ALL = 4.0
_MOST = 0.5


@dataclass(frozen=True)
class Comparison:
    """How far two networks are apart on one input.

    Args:
        batch: Examples in the input.
        largest_difference: Of any output value.
        largest_output: Of the reference, in absolute value.
        tolerance: Largest difference allowed, as a share of ``largest_output``.
    """

    batch: int
    largest_difference: float
    largest_output: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; not a number is not."""
        return self.largest_difference <= self.tolerance * self.largest_output

    def record(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return asdict(self)


def tolerance(dtype: torch.dtype, share: float = 0.0) -> float:
    """Return the largest difference allowed, as a share of the largest output.

    Args:
        dtype: The type that is computed in.
        share: What rounding weights and inputs to it does (:func:`rounding_share`). Rounding every activation too
            does a few times that, and a network cannot be held to less; but half the largest output is never right.
    """
    usual = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
    return max(usual, min(_WEIGHTS_TO_ALL * share, _MOST))


def rounding_share(net: nn.Module, inputs: Inputs, dtype: torch.dtype) -> float:
    """Return how far a network's outputs move, as a share of the largest, when weights and inputs are rounded.

    Everything is computed in the network's own type, so that this says how touchy the network is and nothing about
    how well the other type is computed in.

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
        expected: What the reference computed.
        got: What came out; flat or in the same structure.
        allowed: Largest difference allowed, as a share of the largest output.
        batch: For the record.

    Raises:
        ExportError: If the outputs differ in number or shape.

    >>> compare(torch.ones(2, 3), torch.full((2, 3), 1.5), 1e-4, 2).largest_difference
    0.5
    """
    left = [t for t in tree_leaves(expected) if isinstance(t, Tensor)]
    right = [t for t in tree_leaves(got) if isinstance(t, Tensor)]
    shapes = [tuple(t.shape) for t in left], [tuple(t.shape) for t in right]
    if shapes[0] != shapes[1]:
        raise ExportError(f"outputs of shapes {shapes[1]} came back, the network gives {shapes[0]}")
    pairs = [(a.detach().cpu().double(), b.detach().cpu().double()) for a, b in zip(left, right, strict=True)]
    differences = [float((a - b).abs().max()) for a, b in pairs if a.numel()]
    # max() of Python drops a NaN that is not first; a sum keeps it.
    largest = max(differences, default=0.0) if sum(differences) == sum(differences) else float("nan")
    scale = max((float(a.abs().max()) for a, _ in pairs if a.numel()), default=0.0)
    return Comparison(batch, largest, scale, allowed)


def check_same(
    reference: nn.Module, net: nn.Module, example_inputs: Any = None, *, name: str = "the exported network"
) -> Comparison:
    """Compare two networks in eval mode on one input.

    Args:
        reference: What must be computed, such as a supernet at the exported widths.
        net: The network in question.
        example_inputs: As in :func:`widthkit.trace`.
        name: What the error calls the network.

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

    By default cuDNN rounds the inputs of float32 convolutions to TF32. That moves results by 1e-3, ten times what is
    allowed in float32, and is nobody's mistake. The settings are put back; on a CPU there is nothing to do.
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
    """Raise if a comparison failed.

    Raises:
        ExportError: With the worst comparison's numbers.
    """
    for one in found:
        if not one.passed:
            raise ExportError(
                f"{name} differs from the reference by {one.largest_difference:.3g} on a batch of {one.batch} (largest "
                f"output {one.largest_output:.3g}, allowed {one.tolerance:g} of it); nothing was written"
            )


def usable_inputs(net: nn.Module, example_inputs: Any) -> Inputs:
    """Return example inputs: those given, or the first of the usual ones that the network runs on."""
    if example_inputs is not None:
        return as_inputs(example_inputs, float_dtype(net))
    failure = "none fits"
    for inputs in likely_inputs(net):
        try:
            outputs(net, inputs)
            return inputs
        except Exception as error:
            failure = " ".join(str(error).split())[:120]
    raise ExportError(f"{type(net).__name__} runs on no usual image size ({failure}); pass example_inputs=")


def outputs(net: nn.Module, inputs: Inputs) -> Any:
    """Run a network in eval mode without gradients, on its own device; its flags are put back."""
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
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
    """Return inputs of another batch size: examples are left out or, mirrored, repeated.

    >>> resized((torch.tensor([[1, 2]]),), 2)[0].tolist()
    [[1, 2], [2, 1]]
    """
    own = batch_size(inputs)

    def change(t: Tensor) -> Tensor:
        if not t.ndim or t.shape[0] != own:
            return t
        more = [t.flip(-1) if i % 2 else t for i in range(-(-batch // own))]
        return torch.cat(more)[:batch]

    resize: Callable[[Any], Inputs] = lambda tree: tree_map_only(Tensor, change, tree)  # noqa: E731
    return resize(inputs)
