"""Find the channel groups of a model by running it on labels."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from widthkit.errors import ModelError, TraceError, WidthkitError
from widthkit.graph import ChannelGraph
from widthkit.modules.clone import meta_clone, real_clone
from widthkit.trace.build import freeze_matching, freeze_produced, freeze_unused, seed_labels, under
from widthkit.trace.candidate import Draft
from widthkit.trace.context import RunState, flat_tensors
from widthkit.trace.inputs import Inputs, as_inputs, batch_size, candidates, float_dtype, needs_values
from widthkit.trace.probe import probe
from widthkit.trace.record_program import double_batch, with_program
from widthkit.trace.recorder import record, to_device
from widthkit.trace.settle import settle
from widthkit.trace.size_uses import Claim, ClaimWatch
from widthkit.trace.sizes import install

__all__ = ["trace"]


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
    with _uncollected():
        return _trace(model, example_inputs, freeze, only, free_outputs)


def _trace(
    model: nn.Module, example_inputs: Any, freeze: Sequence[str], only: Sequence[str], free_outputs: bool
) -> ChannelGraph:
    for text, patterns in (("freeze", freeze), ("only", only)):
        if isinstance(patterns, str):
            raise TraceError(f"{text}= takes a list of module paths, not a string; write {text}=['{patterns}']")
    first = _first_run(model, example_inputs)
    _freeze_by_name(first.draft, freeze, only)
    if not free_outputs:
        for labels in first.output_labels:
            first.draft.run.store.freeze(labels, "model output; free_outputs=True lets it vary")
    # Only now, since sizes are weighed by what is frozen already.
    settle(first.draft.run, first.claims)
    first.draft.free_outputs = free_outputs
    return with_program(first.draft, probe(first.draft))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Pause Python's search for cycles: a trace makes many objects and keeps them, and the search goes through all."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclasses.dataclass
class _FirstRun:
    draft: Draft
    output_labels: list[Any]
    claims: list[Claim]


def _refuse_wrappers(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected an nn.Module, got {type(model).__name__}")
    name = type(model).__name__
    if name in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"):
        raise ModelError(f"{name} wraps the model; pass model.module instead")
    if name == "OptimizedModule" or hasattr(model, "_orig_mod"):
        raise ModelError("the model is compiled; pass the original module (model._orig_mod) and compile the result")
    if any(type(p).__name__ in ("UninitializedParameter", "UninitializedBuffer") for p in model.parameters()):
        raise ModelError(f"{name} has lazy parameters without a shape; run it once on a batch, then pass it again")


def _first_run(model: nn.Module, example: Any) -> _FirstRun:
    """Run a copy on the meta device; where that fails for every example input, run a real copy.

    The real copy leaves out costly arithmetic at first, and does everything where a model does not run like that.
    """
    options = [as_inputs(example, float_dtype(model))] if example is not None else list(candidates(model))
    failure = ""
    home = next((p.device.type for p in model.parameters()), "cpu")
    ways = [("meta", meta_clone, False)]
    if home != "meta":
        ways += [(home, real_clone, True), (home, real_clone, False)]
    for device, clone, hollow in ways:
        for inputs in options:
            try:
                return _run_copy(clone(model), inputs, device, hollow)
            except WidthkitError:
                raise
            except Exception as error:
                # The likeliest input comes first, and what it says helps most.
                if device != "meta" or home == "meta":
                    failure = failure or f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                if device == "meta" and needs_values(error):
                    break
    what = "the given example_inputs" if example is not None else "any example input that was tried"
    raise ModelError(f"{type(model).__name__} does not run on {what} ({failure}); pass example_inputs=")


def _run_copy(model: nn.Module, inputs: Inputs, device: str, hollow: bool = False) -> _FirstRun:
    model.eval()
    run = RunState()
    seeds = seed_labels(model, run)
    placed = to_device(inputs, device)
    outputs, claims = watched(model, placed, run, hollow)
    batch = batch_size(inputs)
    notes = _also_in_training(model, placed, run, hollow)
    freeze_unused(model, run, seeds)
    found = flat_tensors((outputs,))
    labels = [labels for t in found for labels in run.dims_of(t) if labels is not None]
    draft = Draft(model, placed, batch, run, seeds, [tuple(t.shape) for t in found], notes=notes, hollow=hollow)
    return _FirstRun(draft, labels, claims)


def watched(model: nn.Module, inputs: Inputs, run: RunState, hollow: bool = False) -> tuple[Any, list[Claim]]:
    """Run a copy with numbers for its integer attributes; return its outputs and what the numbers claim."""
    stack: list[tuple[str, nn.Module]] = []
    watch = ClaimWatch(run, stack)
    old = install(model)
    # Some models replace their buffers while they run (tables for the size of the image); the copy keeps its own.
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        return record(model, inputs, run, stack, watch, hollow), watch.claims
    finally:
        for module, name, value in old:
            vars(module)[name] = value
        for module, own in buffers:
            module._buffers.update(own)


def _also_in_training(model: nn.Module, inputs: Inputs, run: RunState, hollow: bool) -> list[str]:
    """Run once more in training mode when evaluation left parameters out, such as auxiliary heads."""
    tensors = {id(t) for t in model.parameters()}
    if tensors <= run.used:
        return []
    costs, attributes, n_calls = list(run.costs), list(run.attributes), len(run.trail)
    try:
        model.train()
        record(model, double_batch(inputs), run, [], hollow=hollow)
        return ["some modules run in training mode only; both modes were traced"]
    except Exception:
        return []
    finally:
        model.eval()
        run.costs[:] = costs
        del run.trail[n_calls:]
        known = {(a.module, a.name, a.element) for a in attributes}
        run.attributes[:] = attributes + [a for a in run.attributes if (a.module, a.name, a.element) not in known]


def _freeze_by_name(draft: Draft, freeze: Sequence[str], only: Sequence[str]) -> None:
    missed = freeze_matching(draft.model, draft.run, draft.seeds, freeze, "frozen by the user")
    if only:
        chosen = {m for m in {n.rpartition(".")[0] for n in draft.seeds.labels} if any(under(m, p) for p in only)}
        missed += [p for p in only if not any(under(m, p) for m in chosen)]
        for name in draft.seeds.labels:
            if name.rpartition(".")[0] not in chosen and _produces(draft.model, name):
                freeze_produced(draft.model, draft.run, draft.seeds, name, "not among only=")
    if missed:
        raise TraceError(f"'{missed[0]}' matches no module with parameters; see model.named_modules()")


def _produces(model: nn.Module, name: str) -> bool:
    """Whether a tensor makes channels (a weight matrix or kernel) rather than follows them (a norm or a bias)."""
    return model.get_parameter(name).ndim > 1 if name in dict(model.named_parameters()) else False
