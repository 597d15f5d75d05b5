"""Fold batch norms into the convolutions before them with torch's own fuser.

The pairs come from the graph that ``torch.export`` records, not from names: a pair is folded if the convolution's
output goes only to that batch norm and neither module is used twice.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.fx import Node
from torch.nn.utils.fusion import fuse_conv_bn_eval

from widthkit.errors import ExportError, one_line
from widthkit.export.check import call_arguments, usable_inputs
from widthkit.modules.clone import real_clone
from widthkit.trace.inputs import Inputs

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batchnorm(net: nn.Module, example_inputs: Any = None) -> tuple[nn.Module, int]:
    """Return a copy in eval mode in which every batch norm after a convolution is folded into that convolution.

    Args:
        net: Any network that ``torch.export`` can read; it stays as it is.
        example_inputs: As in :func:`widthkit.trace`.

    Returns:
        The copy and the number of folded batch norms. Batch norms before a convolution (DenseNet) stay.

    Raises:
        ExportError: If ``torch.export`` cannot read the network.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    >>> fold_batchnorm(net, (2, 3, 8, 8))
    (Sequential(
      (0): Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
      (2): ReLU()
    ), 1)
    """
    folded = real_clone(net).eval()
    pairs = foldable(folded, usable_inputs(net, example_inputs))
    for conv_path, norm_path in pairs:
        conv, norm = folded.get_submodule(conv_path), folded.get_submodule(norm_path)
        fused: Any = fuse_conv_bn_eval(conv, norm, transpose=isinstance(conv, _TRANSPOSED))  # type: ignore[type-var, arg-type]
        folded.set_submodule(conv_path, fused)
        folded.set_submodule(norm_path, _activation_of(norm))
    return folded, len(pairs)


def foldable(net: nn.Module, inputs: Inputs) -> list[tuple[str, str]]:
    """List ``(path of a convolution, path of the only batch norm that reads it)`` in the order of the run."""
    args, kwargs = call_arguments(inputs)
    try:
        with torch.no_grad():
            program = torch.export.export(net, args, kwargs)
    except Exception as error:
        raise ExportError(
            f"torch.export cannot read {type(net).__name__}, so its batch norms cannot be folded ({one_line(error)}); "
            "export it without folding"
        ) from error
    names = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    paths = dict(net.named_modules())
    # A tensor that two modules own has two names, but is one input of the graph.
    owners = Counter(id(t) for _, t in net.named_parameters(remove_duplicate=False))
    found = []
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten.batch_norm.default or not isinstance(node.args[0], Node):
            continue
        conv_node = node.args[0]
        if "conv" not in str(conv_node.target) or len(conv_node.users) != 1:
            continue
        conv_path, norm_path = _owner(conv_node.args[1], names), _owner(node.args[3], names)
        if conv_path is None or norm_path is None:
            continue
        conv, norm = paths[conv_path], paths[norm_path]
        alone = owners[id(conv.weight)] == 1 and all(owners[id(p)] == 1 for p in norm.parameters(recurse=False))
        if alone and type(norm) in (*_NORMS, BatchNormAct2d) and _foldable_conv(conv):
            found.append((conv_path, norm_path))
    return found


def _foldable_conv(module: nn.Module) -> bool:
    if isinstance(module, _TRANSPOSED):
        # The fuser scales dim 1 of the weight, which holds the output channels of one group only.
        return module.groups == 1
    return isinstance(module, _CONVS)


def _owner(node: Any, names: dict[str, str]) -> str | None:
    """Return the path of the module that owns the tensor of a node, if only one node reads that tensor."""
    if not isinstance(node, Node) or node.name not in names or len(node.users) != 1:
        return None
    return names[node.name].rpartition(".")[0]


def _activation_of(norm: nn.Module) -> nn.Module:
    """Return what is left of a batch-norm module once its normalisation is folded: its activation, or nothing."""
    return nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
