"""Shape inference agrees with PyTorch: shape, type, strides; calls that raise still raise."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from widthkit.trace.shape_inference import HANDLERS, POINTWISE, infer


class _Compared(TorchDispatchMode):
    """Infers the result of every call, compares it with PyTorch's, and notes which operators were answered."""

    def __init__(self):
        super().__init__()
        self.inferred, self.left_to_pytorch = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = infer(func, args, kwargs)
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        (self.left_to_pytorch if found is None else self.inferred).add(name)
        if found is not None:
            pairs = list(zip(found, out, strict=True)) if isinstance(out, tuple) else [(found, out)]
            for own, theirs in pairs:
                assert own.device.type == "meta"
                assert (own.shape, own.dtype, own.stride()) == (theirs.shape, theirs.dtype, theirs.stride()), name
                assert (own is args[0]) == (theirs is args[0]), name
        return out


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, device="meta", dtype=dtype)


X, V = empty(2, 8, 5, 4), empty(8)
TOKENS, MATRIX, BIAS = empty(2, 7, 6), empty(9, 6), empty(9)
HEADS = empty(2, 3, 7, 4)


def lstm(*shape, x=None, **options):
    layer = torch.nn.LSTM(6, 5, device="meta", **options)
    return layer(empty(*shape) if x is None else x)


VALID = {
    "relu": lambda: F.relu(X),
    "relu6": lambda: torch.ops.aten.relu6(X),
    "gelu": lambda: F.gelu(X),
    "silu": lambda: F.silu(X),
    "silu_": lambda: F.silu(empty(2, 3), inplace=True),
    "mish": lambda: F.mish(X),
    "elu": lambda: F.elu(X, 0.5),
    "selu": lambda: F.selu(X),
    "leaky_relu": lambda: F.leaky_relu(X, 0.1),
    "softplus": lambda: F.softplus(X),
    "hardtanh": lambda: F.hardtanh(X),
    "hardswish": lambda: F.hardswish(X),
    "hardsigmoid": lambda: F.hardsigmoid(X),
    "sigmoid": lambda: X.sigmoid(),
    "tanh": lambda: X.tanh(),
    "exp": lambda: X.exp(),
    "sqrt": lambda: X.sqrt(),
    "rsqrt": lambda: X.rsqrt(),
    "neg": lambda: -X,
    "abs": lambda: X.abs(),
    "square": lambda: X.square(),
    "reciprocal": lambda: X.reciprocal(),
    "add": lambda: X + X,
    "add_": lambda: X.clone().add_(V.view(8, 1, 1)),
    "sub": lambda: X - 1,
    "mul": lambda: V.view(1, 8, 1, 1) * X,
    "div": lambda: X / empty(2, 8, 1, 1),
    "clamp": lambda: X.clamp(0, 1),
    "clamp_min": lambda: X.clamp_min(1e-3),
    "batch_norm": lambda: F.batch_norm(X, V, V, V, V),
    "layer_norm": lambda: F.layer_norm(TOKENS, (6,), empty(6), empty(6)),
    "group_norm": lambda: F.group_norm(X, 4, V, V),
    "linear": lambda: F.linear(TOKENS, MATRIX, BIAS),
    "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(HEADS, HEADS, empty(2, 3, 7, 5)),
    "mean": lambda: X.mean((2, 3), keepdim=True),
    "cat": lambda: torch.cat([X, X[:, :3].contiguous()], 1),
    "lstm": lambda: lstm(3, 2, 6, num_layers=2, bidirectional=True),
}


@pytest.mark.parametrize("name", VALID)
def test_results_are_pytorchs(name):
    with torch.inference_mode(), _Compared() as seen:
        VALID[name]()
    assert name in seen.inferred, f"{name} was left to PyTorch, so nothing was compared"


def test_every_operator_is_compared():
    assert {n.removesuffix("_") for n in VALID} == POINTWISE | set(HANDLERS)


UNUSUAL = {
    "types": lambda: X + X.double(),
    "integers": lambda: empty(3, dtype=torch.int64) / 2,
    "comparison into floats": lambda: X.mul(X > 0),
    "layout": lambda: F.relu(X.permute(0, 2, 3, 1)),
    "channels last": lambda: F.relu(X.to(memory_format=torch.channels_last)),
    "complex scalar": lambda: X * 1j,
    "batch statistics": lambda: F.batch_norm(X, None, None, V, V, training=True),
    "mean of everything": lambda: X.mean(),
    "mean in another type": lambda: X.mean(1, dtype=torch.float64),
    "attention with a mask": lambda: F.scaled_dot_product_attention(HEADS, HEADS, HEADS, empty(7, 7)),
    "causal attention": lambda: F.scaled_dot_product_attention(HEADS, HEADS, HEADS, is_causal=True),
    "grouped queries": lambda: F.scaled_dot_product_attention(HEADS, HEADS[:, :1], HEADS[:, :1], enable_gqa=True),
    "transposed heads": lambda: F.scaled_dot_product_attention(*[HEADS.transpose(1, 2)] * 3),
    "outer": lambda: empty(4, 1) * empty(1, 5),
    "out of nothing": lambda: torch.cat([empty(0), empty(3)]),
    "gelu by tanh": lambda: F.gelu(X, approximate="tanh"),
    "celu": lambda: F.celu(X),
    "one by one, channels last": lambda: F.relu(empty(2, 5, 1, 1).to(memory_format=torch.channels_last)),
    "one channel, channels last": lambda: torch.cat([empty(2, 1, 4, 4).to(memory_format=torch.channels_last)] * 2, 1),
    "rounded": lambda: torch.div(X, X, rounding_mode="floor"),
    "vector": lambda: F.linear(empty(6), MATRIX, BIAS),
    "lstm, batch first": lambda: lstm(3, 2, 6, batch_first=True),
    "lstm, one example": lambda: lstm(3, 6, bias=False),
    "lstm, another layout": lambda: lstm(x=empty(2, 6, 4).permute(0, 2, 1), batch_first=True, bidirectional=True),
    "lstm, projected": lambda: lstm(3, 2, 6, proj_size=2),
    "lstm, packed": lambda: lstm(x=torch.nn.utils.rnn.PackedSequence(empty(5, 6), torch.tensor([2, 2, 1]))),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_calls_agree_too(name):
    with torch.inference_mode(), _Compared():
        UNUSUAL[name]()


WRONG = {
    "unknown approximation": lambda: F.gelu(X, approximate="bogus"),
    "unknown rounding": lambda: torch.div(X, X, rounding_mode="bogus"),
    "no bounds": lambda: torch.clamp(X),
    "negative groups": lambda: F.group_norm(X, -4),
    "alpha of zero": lambda: F.celu(X, 0.0),
    "linear": lambda: F.linear(empty(2, 5), MATRIX),
    "bias": lambda: F.linear(TOKENS, MATRIX, empty(8)),
    "batch norm": lambda: F.batch_norm(X, empty(7), empty(7)),
    "batch norm's weight": lambda: F.batch_norm(X, V, V, empty(7)),
    "layer norm": lambda: F.layer_norm(TOKENS, (5,)),
    "group norm": lambda: F.group_norm(X, 3),
    "group norm's weight": lambda: F.group_norm(X, 4, empty(7)),
    "add": lambda: X + empty(7, 1, 1),
    "add_": lambda: empty(3).add_(empty(2, 3)),
    "mean": lambda: X.mean((4,)),
    "mean twice": lambda: X.mean((1, 1)),
    "cat": lambda: torch.cat([X, empty(2, 8, 5, 3)], 1),
    "cat's dim": lambda: torch.cat([X, X], 4),
    "attention": lambda: F.scaled_dot_product_attention(HEADS, empty(2, 3, 7, 5), HEADS),
    "lstm": lambda: torch._VF.lstm(
        empty(3, 2, 6), [empty(1, 2, 5)] * 2, [empty(20, 7), empty(20, 5)], False, 1, 0.0, False, False, False
    ),
    "keys and values": lambda: F.scaled_dot_product_attention(HEADS, HEADS, empty(2, 3, 6, 4)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_are_left_to_pytorch(name):
    with pytest.raises((RuntimeError, ValueError, IndexError)), torch.inference_mode(), _Compared():
        WRONG[name]()


def test_other_namespaces_are_left_to_pytorch():
    with torch.library._scoped_library("widthkit_test", "DEF") as library:
        library.define("mish(Tensor x) -> Tensor")
        library.impl("mish", lambda x: x[:, ::2], "Meta")
        assert infer(torch.ops.widthkit_test.mish.default, (X,), {}) is None


def test_shapes_that_broadcast_or_not_in_all_pairs():
    shapes = [(), (1,), (3,), (2, 1), (2, 3), (1, 3), (4, 1, 3), (4, 2, 1), (2,), (4, 2, 3)]
    for a, b in itertools.product(shapes, repeat=2):
        left, right = empty(a), empty(b)
        try:
            expected = torch.broadcast_shapes(a, b)
        except RuntimeError:
            expected = None
        found = infer(torch.ops.aten.add.Tensor, (left, right), {})
        if found is not None:
            assert found.shape == expected, (a, b)
            assert found.stride() == (left + right).stride(), (a, b)
