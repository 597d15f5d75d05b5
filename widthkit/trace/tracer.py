"""Trace a model: run a labelled copy, tie what its sizes say, and probe shrunk copies."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from widthkit.errors import ModelError, TraceError, WidthkitError
from widthkit.graph import ChannelGraph
from widthkit.modules.clone import meta_clone, real_clone
from widthkit.trace.candidate import Candidate
from widthkit.trace.inputs import Inputs, as_inputs, batch_size, float_dtype, likely_inputs, needs_values
from widthkit.trace.labels import Labels
from widthkit.trace.outputs import Outputs
from widthkit.trace.probe import probe
from widthkit.trace.record_program import double_batch, with_program
from widthkit.trace.recorder import Stack, record, to_device
from widthkit.trace.recording import Recording
from widthkit.trace.size_ties import freeze_fixed_sizes, tie_sizes
from widthkit.trace.size_uses import SizeUseRecorder
from widthkit.trace.sizes import install_traced_ints
from widthkit.trace.tensor_labels import freeze_matching, freeze_produced, freeze_unused, label_tensors, under


def trace(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    freeze: Sequence[str] = (),
    only: Sequence[str] = (),
    free_outputs: bool = False,
) -> ChannelGraph:
    """Find out which channels of a model belong together.

    The model itself is never run or changed: the trace works on a copy on the meta device (no memory, no
    arithmetic), or on a real copy where a model's control flow depends on values.

    Args:
        model: Any ``nn.Module``.
        example_inputs: A tensor, a shape such as ``(1, 3, 224, 224)``, a tuple of arguments, or a mapping of keyword
            arguments. ``None`` reads timm's and torchvision's metadata or tries common image sizes.
        freeze: Module paths or patterns (``"head"``, ``"layer4.*"``) whose output widths stay.
        only: If given, the output widths of all other modules stay.
        free_outputs: Let the model's outputs vary in width (backbones).

    Returns:
        The channel graph; its MACs are per example.

    Raises:
        ModelError: If the model cannot run on the example input.
        TraceError: If a pattern matches no module or the groups cannot be found.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> graph = trace(net, (1, 3, 8, 8))
    >>> graph.full, graph.macs(), graph.macs({"0": 4})
    ({'0': 8}, 12384, 6192)
    """
    _refuse_wrappers(model)
    for option, patterns in (("freeze", freeze), ("only", only)):
        if isinstance(patterns, str):
            raise TraceError(f"{option}= takes a list of module paths, not a string; write {option}=['{patterns}']")
    with _no_garbage_collection():
        first = _first_run(model, example_inputs)
        candidate = first.candidate
        _freeze_by_name(candidate, freeze, only)
        if not free_outputs:
            for labels in first.output_labels:
                candidate.recording.store.freeze(labels, "model output; free_outputs=True lets it vary")
        freeze_fixed_sizes(candidate.recording)
        # After all freezes: which sizes agree depends on what is frozen.
        tie_sizes(candidate.recording)
        candidate.free_outputs = free_outputs
        return with_program(candidate, probe(candidate))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pause garbage collection: a trace makes and keeps many objects, and every collection would visit all of them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}


def _refuse_wrappers(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected an nn.Module, got {type(model).__name__}")
    name = type(model).__name__
    if name in _WRAPPERS:
        raise ModelError(f"{name} wraps the model; pass model.module instead")
    if name == "OptimizedModule":
        raise ModelError("the model is compiled; pass the original module (model._orig_mod) and compile the result")
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise ModelError(f"{name} has lazy parameters without a shape; run it once on a batch, then pass it again")


@dataclasses.dataclass
class _FirstRun:
    candidate: Candidate
    output_labels: list[Labels]


def _first_run(model: nn.Module, example: Any) -> _FirstRun:
    """Run a copy on the meta device; where that fails for every example input, run a real copy.

    The real copy runs with fake values first, and computes everything only where a model does not run like that.
    """
    options = [as_inputs(example, float_dtype(model))] if example is not None else list(likely_inputs(model))
    home = next((p.device.type for p in model.parameters()), "cpu")
    ways: list[tuple[str, Callable[[nn.Module], nn.Module], bool]] = [("meta", meta_clone, False)]
    if home != "meta":
        ways += [(home, real_clone, True), (home, real_clone, False)]
    failure = ""
    for device, clone, fake_values in ways:
        for inputs in options:
            try:
                return _run_copy(model, clone(model), inputs, device, fake_values)
            except WidthkitError:
                raise
            except Exception as error:
                # The first input is the likeliest, so its error on the model's own device helps most.
                if device == home:
                    failure = failure or f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                if device == "meta" and needs_values(error):
                    break
    what = "the given example_inputs" if example is not None else "any example input that was tried"
    raise ModelError(f"{type(model).__name__} does not run on {what} ({failure}); pass example_inputs=")


def _run_copy(original: nn.Module, model: nn.Module, inputs: Inputs, device: str, fake_values: bool) -> _FirstRun:
    model.eval()
    recording = Recording()
    tensor_labels = label_tensors(model, recording)
    placed = to_device(inputs, device)
    outputs = _run_with_traced_ints(model, placed, recording, fake_values)
    notes = [f"the outputs hold a {name}, which the trace cannot look into" for name in sorted(outputs.opaque)]
    notes += _run_in_training_mode(model, placed, recording, fake_values)
    freeze_unused(model, recording, tensor_labels)
    found = outputs.tensors
    candidate = Candidate(
        model,
        placed,
        batch_size(inputs),
        recording,
        tensor_labels,
        [tuple(t.shape) for t in found],
        original,
        inputs,
        [recording.dims_of(t) for t in found],
        notes=notes,
        fake_values=fake_values,
    )
    labels = [labels for t in found for labels in recording.dims_of(t) if labels is not None]
    return _FirstRun(candidate, labels)


def _run_with_traced_ints(model: nn.Module, inputs: Inputs, recording: Recording, fake_values: bool) -> Outputs:
    """Run a copy whose integer attributes are traced integers; return its outputs."""
    stack: Stack = []
    recorder = SizeUseRecorder(recording, stack)
    replaced = install_traced_ints(model, recorder.watch)
    # Some models replace their buffers while they run (tables for the image size). The copy gets its own back.
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        return record(model, inputs, recording, stack, recorder, fake_values)
    finally:
        for module, name, value in replaced:
            vars(module)[name] = value
        for module, own in buffers:
            module._buffers.update(own)


def _run_in_training_mode(model: nn.Module, inputs: Inputs, recording: Recording, fake_values: bool) -> list[str]:
    """Run once more in training mode when evaluation left parameters out, such as auxiliary heads; return notes.

    Only ties and freezes of this run count: costs, calls and attributes describe the model in evaluation mode.
    """
    if {id(t) for t in model.parameters()} <= recording.used:
        return []
    costs, attributes, n_calls = list(recording.costs), list(recording.attributes), len(recording.calls)
    try:
        model.train()
        record(model, double_batch(inputs), recording, [], fake_values=fake_values)
        return ["some modules run in training mode only; both modes were traced"]
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return [f"some parameters are not used in evaluation mode, and the model does not run in training mode ({why})"]
    finally:
        model.eval()
        recording.costs[:] = costs
        del recording.calls[n_calls:]
        recorded = {a.key for a in attributes}
        recording.attributes[:] = attributes + [a for a in recording.attributes if a.key not in recorded]


def _freeze_by_name(candidate: Candidate, freeze: Sequence[str], only: Sequence[str]) -> None:
    model, recording, labels = candidate.model, candidate.recording, candidate.tensor_labels
    unmatched = freeze_matching(model, recording, labels, freeze, "frozen by the user")
    if only:
        chosen = {m for m in {n.rpartition(".")[0] for n in labels} if any(under(m, p) for p in only)}
        unmatched += [p for p in only if not any(under(m, p) for m in chosen)]
        for name in labels:
            if name.rpartition(".")[0] not in chosen and _produces(model, name):
                freeze_produced(model, recording, labels, name, "not among only=")
    if unmatched:
        raise TraceError(f"'{unmatched[0]}' matches no module with parameters; see model.named_modules()")


def _produces(model: nn.Module, name: str) -> bool:
    """Whether a tensor produces channels (a weight matrix or kernel) rather than follows them (a norm or a bias)."""
    return model.get_parameter(name).ndim > 1 if name in dict(model.named_parameters()) else False
