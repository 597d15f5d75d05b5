"""Run a labelled copy of the model once and apply a coupling rule to every operator call."""

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
from widthkit.trace.context import OpContext, flat_tensors
from widthkit.trace.fake_values import run_operator
from widthkit.trace.inputs import Inputs, Keywords
from widthkit.trace.outputs import Outputs
from widthkit.trace.recording import Recording

Stack = list[tuple[str, nn.Module]]
"""Path and module of every module whose forward is running, the innermost last."""


class Recorder(TorchDispatchMode):
    """Sees every ATen call of a run; under inference mode composite operators arrive whole.

    Args:
        recording: Collects what the rules say.
        stack: The running modules.
        fake_values: As in :func:`record`.
    """

    def __init__(self, recording: Recording, stack: Stack, fake_values: bool = False) -> None:
        super().__init__()
        self.recording = recording
        self.stack = stack
        self.fake_values = fake_values

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then its rule; an operator without a rule freezes its inputs."""
        kwargs = kwargs or {}
        out = run_operator(func, args, kwargs, self.fake_values)
        tensors = flat_tensors((args, kwargs))
        self.recording.kept_alive.append((tensors, out))
        self.recording.used.update(id(t) for t in tensors)
        path, module = self.stack[-1]
        context = OpContext(self.recording, func, args, kwargs, out, path, module)
        rule = rules.find(func)
        if rule is not None:
            _apply(rule, context)
        else:
            for tensor in context.tensors():
                context.freeze_tensor(tensor, "has no coupling rule (docs/rules.md says how to register one)")
        self.recording.add_call(path, (func, args, kwargs, out), tensors, flat_tensors((out,)))
        return out


def _apply(rule: rules.Rule, context: OpContext) -> None:
    """Apply a rule and report an exception as the rule's, so that no one looks for it in the model or its input."""
    try:
        rule(context)
    except WidthkitError:
        raise
    except Exception as error:
        raise TraceError(
            f"{context.where}: its coupling rule failed ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:160]}); register another rule for '{context.name}' (docs/rules.md)"
        ) from error


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """Call a model with its example inputs, by position or by name."""
    if len(inputs) == 1 and isinstance(inputs[0], Keywords):
        return model(**inputs[0])
    return model(*inputs)


def to_device(inputs: Any, device: str) -> Any:
    """Move every tensor of a nested input to a device."""
    return tree_map_only(Tensor, lambda t: t.detach().to(device), inputs)


@contextmanager
def same_operators(inputs: Inputs) -> Iterator[None]:
    """Make runs repeatable: inference mode, the random state put back, and no fused encoder, which hides its operators.

    Args:
        inputs: The random state of their CUDA devices is put back, too.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    devices = [t.device for t in flat_tensors(inputs) if t.device.type == "cuda"]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.random.fork_rng(devices=devices), torch.inference_mode():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


@contextmanager
def _module_stack(model: nn.Module, stack: Stack) -> Iterator[None]:
    """Keep the running modules on a stack; after an error it still names the module that failed."""
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
    inputs: Inputs,
    recording: Recording,
    stack: Stack,
    function_mode: AbstractContextManager[Any] | None = None,
    fake_values: bool = False,
) -> Outputs:
    """Run ``model`` once under the recorder and return its outputs.

    Args:
        model: A copy that may be run; its tensors are labelled in ``recording``.
        inputs: Example inputs on the model's device.
        recording: Collects what the rules say.
        stack: Filled with the running modules; after an exception the innermost one is still there.
        function_mode: A mode that is active during the run as well.
        fake_values: Return made-up values instead of computing expensive operators
            (:mod:`widthkit.trace.fake_values`).
    """
    stack.append(("", model))
    with (
        same_operators(inputs),
        _module_stack(model, stack),
        function_mode or nullcontext(),
        Recorder(recording, stack, fake_values),
    ):
        outputs = Outputs.of(call_model(model, inputs))
    stack.pop()
    return outputs
