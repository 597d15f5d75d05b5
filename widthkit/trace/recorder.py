"""Run a copy of the model once and let the rules follow every operator call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from widthkit.errors import TraceError, WidthkitError
from widthkit.trace import rules
from widthkit.trace.context import OpContext, RunState, flat_tensors
from widthkit.trace.fake_values import result
from widthkit.trace.inputs import Keywords


class Recorder(TorchDispatchMode):
    """Sees every ATen call of a run; under inference mode composite operators arrive whole."""

    def __init__(self, run: RunState, stack: list[tuple[str, nn.Module]], hollow: bool = False) -> None:
        super().__init__()
        self.run = run
        self.stack = stack
        self.hollow = hollow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then its rule; an operator without a rule freezes what enters it."""
        kwargs = kwargs or {}
        out = result(func, args, kwargs, self.hollow)
        tensors = flat_tensors((args, kwargs))
        self.run.keep.append((tensors, out))
        self.run.calls.append((func, args, kwargs, out))
        self.run.used.update(id(t) for t in tensors)
        path, module = self.stack[-1]
        context = OpContext(self.run, func, args, kwargs, out, path, module)
        rule = rules.find(func)
        if rule is not None:
            _apply(rule, context)
        else:
            self._unknown(context)
        self.run.note(path, context.name, tensors, flat_tensors((out,)))
        return out

    def _unknown(self, context: OpContext) -> None:
        labelled = [t for t in context.tensors() if any(d is not None for d in context.dims(t))]
        if labelled:
            self.run.unknown[context.name] = context.path
        for tensor in labelled:
            context.freeze_tensor(tensor, "has no coupling rule (docs/rules.md says how to register one)")


def _apply(rule: rules.Rule, context: OpContext) -> None:
    """Apply a rule; a rule that breaks is its own fault, not the model's or the input's."""
    try:
        rule(context)
    except WidthkitError:
        raise
    except Exception as error:
        raise TraceError(
            f"{context.where}: the coupling rule broke ({type(error).__name__}: {' '.join(str(error).split())[:160]}); "
            f"register another rule for '{context.name}' (docs/rules.md)"
        ) from error


def call(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Call a model with its example inputs, by position or by name."""
    if len(inputs) == 1 and isinstance(inputs[0], Keywords):
        return model(**inputs[0])
    return model(*inputs)


def to_device(inputs: Any, device: str) -> Any:
    """Move every tensor of a nested input."""
    return tree_map_only(Tensor, lambda t: t.detach().to(device), inputs)


@contextmanager
def _module_stack(model: nn.Module, stack: list[tuple[str, nn.Module]]) -> Iterator[None]:
    """Keep the path of the running module on a stack; after an error it still names the module that failed."""
    names = {id(m): n for n, m in model.named_modules()}
    handles = []

    def enter(module: nn.Module, _: Any) -> None:
        stack.append((names[id(module)], module))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        stack.pop()

    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()


def record(
    model: nn.Module,
    inputs: tuple[Any, ...],
    run: RunState,
    stack: list[tuple[str, nn.Module]],
    watch: AbstractContextManager[Any] | None = None,
    hollow: bool = False,
) -> Any:
    """Run ``model`` once under the recorder and return its outputs.

    Args:
        model: A copy that may be run (its tensors labelled in ``run`` beforehand).
        inputs: Example inputs on the model's device.
        run: Collects what the rules say.
        stack: Filled with the running modules; left as it was at the failure when the run raises.
        watch: Also entered around the run.
        hollow: Do not compute convolutions and matrix products (:mod:`widthkit.trace.fake_values`).
    """
    stack.append(("", model))
    fastpath = torch.backends.mha.get_fastpath_enabled()
    devices = [t.device for t in flat_tensors(inputs) if t.device.type == "cuda"]
    try:
        # The fused encoder hides its operators; scaled_dot_product_attention does not.
        torch.backends.mha.set_fastpath_enabled(False)
        with (
            torch.random.fork_rng(devices=devices),
            _module_stack(model, stack),
            torch.inference_mode(),
            watch or nullcontext(),
            Recorder(run, stack, hollow),
        ):
            outputs = call(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    stack.pop()
    return outputs
