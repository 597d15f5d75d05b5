"""Neither a trace nor a refusal leaves a mark on the user's model, nor on the random state."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from topologies import Attention, ConvBN, Net, PlainChain, Residual, point, randomised
from torch import nn

from widthkit.errors import ModelError, WidthkitError, WidthsError
from widthkit.export.dense import export
from widthkit.graph.plan import apply_plan, make_plan
from widthkit.graph.resize import grow
from widthkit.trace import trace

SHAPE = (2, 3, 8, 8)


def fingerprint(model: nn.Module):
    """Everything about a model that a tool could disturb."""
    tensors = {n: (id(t), t._version, t.clone()) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    modules = {
        n: (id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), _plain(m))
        for n, m in model.named_modules()
    }
    return tensors, modules


def _plain(module: nn.Module):
    return {k: copy.copy(v) for k, v in vars(module).items() if isinstance(v, (int, float, str, tuple, list))}


def assert_untouched(model: nn.Module, before) -> None:
    tensors, modules = fingerprint(model)
    assert modules == before[1]
    assert tensors.keys() == before[0].keys()
    for name, (identity, version, value) in tensors.items():
        old_identity, old_version, old_value = before[0][name]
        assert (identity, version) == (old_identity, old_version), name
        assert torch.equal(value, old_value), name


class Failing(PlainChain):
    def forward(self, x):
        super().forward(x)
        raise ValueError("no such thing")


def wild() -> nn.Module:
    torch.manual_seed(0)
    model = Attention()
    model.train()
    model.stem.eval()
    model.qkv.register_forward_hook(lambda *_: None)
    return randomised(model).train()


def foreign_plan():
    with torch.random.fork_rng(devices=[]):
        return make_plan(trace(Residual(), SHAPE), {"a.conv": 2})


@pytest.mark.parametrize("kind", [PlainChain, Residual, Attention, wild])
def test_a_trace_leaves_the_model_and_the_random_state_alone(kind):
    model = kind()
    before, state = fingerprint(model), torch.get_rng_state()
    graph = trace(model, SHAPE)
    export(model, dict.fromkeys(graph.full, 1), graph=graph)
    apply_plan(model, grow(graph, {n: w + 2 for n, w in graph.full.items()})[0])
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda m: trace(m, (2, 5, 8, 8)), "does not run"),
        (lambda m: trace(m, "an image"), "example_inputs"),
        (lambda m: trace(m, SHAPE, freeze=["nowhere"]), "matches no module"),
        (lambda m: trace(m, SHAPE, freeze="stem"), "takes a list"),
        (lambda m: trace(m, SHAPE, only=["nowhere"]), "matches no module"),
        (lambda m: export(m, {"stm.conv": 2}, example_inputs=SHAPE), "did you mean stem.conv"),
        (lambda m: export(m, {"stem.conv": 0}, example_inputs=SHAPE), "at least one unit"),
        (lambda m: export(m, {"stem.conv": [1, 1]}, example_inputs=SHAPE), "distinct"),
        (lambda m: export(m, {"stem.conv": 2.0}, example_inputs=SHAPE), "neither a width"),
        (lambda m: apply_plan(m, foreign_plan()), "trace this model"),
        (lambda m: grow(trace(m, SHAPE), {"stem.conv": 2}), "cannot grow"),
    ],
)
def test_a_refusal_says_what_and_leaves_the_model_alone(attempt, message):
    model = PlainChain()
    before, state = fingerprint(model), torch.get_rng_state()
    with pytest.raises(WidthkitError, match=message):
        attempt(model)
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_model_that_raises_is_left_alone():
    model = Failing()
    before = fingerprint(model)
    with pytest.raises(ModelError, match="no such thing"):
        trace(model, SHAPE)
    assert_untouched(model, before)


def test_a_plan_for_other_shapes_is_refused():
    graph = trace(PlainChain(), SHAPE)
    slim = export(PlainChain(), {"stem.conv": 2}, graph=graph)
    with pytest.raises(WidthsError, match="trace this model again"):
        apply_plan(slim, make_plan(graph, {"stem.conv": 1}))


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda m: nn.DataParallel(m), "pass model.module"),
        (lambda m: torch.compile(m), "compiled"),
        (lambda m: nn.Sequential(nn.LazyConv2d(4, 1)), "lazy"),
        (lambda m: m.forward, "expected an nn.Module"),
    ],
)
def test_wrappers_are_refused(wrap, message):
    with pytest.raises(ModelError, match=message):
        trace(wrap(PlainChain()), SHAPE)


class Sorted(Net):
    """``sort`` along channels has no coupling that could hold; ``logdet`` has no rule at all."""

    def __init__(self, how):
        super().__init__(stem=ConvBN(3, 6), mid=ConvBN(6, 6), head=point(6, 4))
        self.how = how

    def forward(self, x):
        return self.head(self.mid(self.how(self.stem(x))))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda x: x.sort(dim=1).values, "'sort' depends on the order along this dim"),
        (lambda x: x * torch.special.entr(torch.linalg.svdvals(x.mean((2, 3)))).sum(), "no coupling rule"),
        (lambda x: F.local_response_norm(x, 3), "avg_pool3d"),
    ],
)
def test_what_nobody_can_couple_freezes_and_says_so(how, reason):
    graph = trace(Sorted(how), SHAPE)
    assert list(graph.full) == ["mid.conv"]
    assert reason in graph.frozen["stem.conv.weight[0]"]


def test_freeze_only_and_free_outputs():
    assert list(trace(PlainChain(), SHAPE, freeze=["stem"]).full) == ["mid.conv"]
    assert list(trace(PlainChain(), SHAPE, only=["stem"]).full) == ["stem.conv"]
    assert trace(PlainChain(), SHAPE, free_outputs=True).full == {"stem.conv": 6, "mid.conv": 8, "head": 4}


def test_keyword_inputs_and_tuples():
    class Two(Net):
        def forward(self, left, right):
            return self.head(self.a(left) + self.b(right))

    model = Two(a=ConvBN(3, 6), b=ConvBN(3, 6), head=point(6, 4))
    x = torch.zeros(SHAPE)
    assert trace(model, {"left": x, "right": x}).full == trace(model, (x, x)).full == {"a.conv": 6}


def test_example_inputs_are_found():
    class Fixed(PlainChain):
        default_cfg = {"input_size": (3, 12, 12)}

    assert trace(Fixed()).macs() == trace(PlainChain(), (1, 3, 12, 12)).macs()
    assert trace(PlainChain()).macs() == trace(PlainChain(), (1, 3, 224, 224)).macs()


def test_control_flow_on_values_falls_back_to_a_real_copy():
    class Branching(PlainChain):
        def forward(self, x):
            x = self.stem(x)
            return self.head(self.mid(x if float(x.detach().sum()) > -1e9 else -x))

    assert trace(Branching(), SHAPE).full == {"stem.conv": 6, "mid.conv": 8}


class Auxiliary(PlainChain):
    """Uses some parameters in training mode only, where it needs more than it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = point(8, 4)

    def forward(self, x):
        if self.training:
            raise ValueError("training needs targets")
        return super().forward(x)


def test_a_model_that_fails_in_training_mode_is_traced_and_says_so():
    graph = trace(Auxiliary(), SHAPE)
    assert graph.full == {"stem.conv": 6, "mid.conv": 8}
    assert graph.frozen["aux.weight[1]"] == "not used in the traced run"
    assert any("training mode (ValueError: training needs targets)" in note for note in graph.notes)


class Described(nn.Module):
    """Takes one mapping, as detectors and multi-modal models do."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(1, 8, 3)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, batch):
        return self.last(F.relu(self.left(batch["image"]) + self.right(batch["mask"])))


class Named(Described):
    def forward(self, image, mask):
        return super().forward({"image": image, "mask": mask})


@pytest.mark.parametrize(("kind", "wrap"), [(Described, lambda inputs: (inputs,)), (Named, dict)])
def test_a_mapping_is_keywords_and_a_tuple_of_one_mapping_is_an_argument(kind, wrap):
    inputs = {"image": torch.randn(2, 3, 8, 8), "mask": torch.randn(2, 1, 8, 8)}
    assert trace(kind(), wrap(inputs)).full == {"left": 8}
