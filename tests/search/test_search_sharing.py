"""Judging together: bit-identical to judging one by one, each shared operator once, and never where it is unsafe."""

import gc
import random
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.densenet import DenseNet
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.resnet import BasicBlock, ResNet

from benchmarks.greedy import bounds
from widthkit.budget import parse_budget
from widthkit.errors import OptionError
from widthkit.search import Judging, search
from widthkit.search.evaluator import BLOCK, Evaluator
from widthkit.search.sharing import sharing_order
from widthkit.search.sharing.stand_in import StandIn
from widthkit.supernet import make_supernet
from widthkit.testing import small_graph
from widthkit.trace import trace

SIZE = 16
MADE = []
TAKEN = []
MEANS = []


@torch.library.custom_op("widthkit_test::counted", mutates_args=())
def counted(x: torch.Tensor, place: int) -> torch.Tensor:
    """An identity that counts how often it really runs."""
    MADE.append(place)
    return x.clone()


@counted.register_fake
def _(x, place):
    return torch.empty_like(x)


class Chain(nn.Module):
    """Five convolutions; ``extra`` may do anything to what goes through them."""

    def __init__(self, extra=None, norm=nn.BatchNorm2d):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(5))
        self.norms = nn.ModuleList(norm(8) for _ in range(5))
        self.head = nn.Linear(8, 4)
        self.extra = extra or (lambda self, x, i: x)

    def forward(self, x):
        for i, (conv, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            x = self.extra(self, F.relu(norm(conv(x)), inplace=True), i)
        return self.head(x.mean((2, 3)))


class Branching(Chain):
    """Goes another way where the activations say so, through a number and through a truth value."""

    most = 1e9

    def forward(self, x):
        for conv, norm in zip(self.layers, self.norms, strict=True):
            y = F.relu(norm(conv(x)))
            MEANS.append(float(y.mean()))
            TAKEN.append(float(y.mean()) > self.most or bool(y.amin() > 0))
            if TAKEN[-1]:
                y = y + 0.1 * y.flip(-1)
            x = y
        return self.head(x.mean((2, 3)))


MODELS = {
    "resnet": lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4),
    "mobilenet": lambda: MobileNetV2(4, 0.25),
    "densenet": lambda: DenseNet(4, (2, 3), 8, num_classes=4),
    "squeeze and excitation": lambda: torchvision.models.efficientnet._efficientnet(
        torchvision.models.efficientnet._efficientnet_conf("efficientnet_b0", width_mult=0.2, depth_mult=0.3)[0],
        0.0,
        None,
        None,
        False,
        num_classes=4,
    ),
    "shuffle": lambda: torchvision.models.ShuffleNetV2([1, 1, 1], [8, 16, 16, 16, 16], num_classes=4),
}


@cache
def batch(n=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, SIZE, SIZE, generator=generator), torch.randint(0, 4, (n,), generator=generator)


def build(model, strategy="ua", **options):
    torch.manual_seed(1)
    return make_supernet(model.eval(), strategy, example_inputs=(1, 3, SIZE, SIZE), k=4, **options)


def steps(net, genes=None):
    now = net.space.largest if genes is None else net.space.decode(genes)
    return [c for c in (net.space.narrower(now, name) for name in net.space.names) if c is not None]


def chain(extra=None, strategy="ua", kind=Chain, **options):
    """A supernet of a chain; traced without the extra, whose operators need no rule."""
    torch.manual_seed(1)
    model = kind(extra, **options)
    plain = Chain(**options)
    return make_supernet(model, strategy, graph=trace(plain, (1, 3, SIZE, SIZE)), k=4)


def compare(net, vectors, **options):
    """Judge together and one by one; return both, and the evaluator that judged together."""
    together = Evaluator(net, [batch()], F.cross_entropy, Judging(**options))
    found = dict(together.judge_many(vectors))
    alone = Evaluator(net, [batch()], F.cross_entropy, Judging(**options))
    return [found[i] for i in range(len(vectors))], [alone(v) for v in vectors], together


# --- the same decisions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_shared_losses_are_bit_identical(name):
    net = build(MODELS[name](), "ua")
    vectors = steps(net)
    shared, plain, judge = compare(net, vectors)
    assert shared == plain
    assert judge.unshared == ""
    assert judge.peak_bytes > 0


@pytest.mark.parametrize("strategy", ["bc", "bcv2", "locally-free"])
def test_every_path_has_its_own_memo(strategy):
    net = build(MODELS["resnet"](), strategy)
    genes = np.random.default_rng(3).integers(1, 4, len(net.space.groups))
    shared, plain, judge = compare(net, steps(net, genes), batch_size=3)
    assert shared == plain
    assert judge.unshared == ""


def test_any_list_of_widths_is_judged_together():
    """Random ones, some of them equal, some differing late: no parent is needed."""
    net = build(MODELS["densenet"]())
    rng = np.random.default_rng(0)
    vectors = [net.space.sample(rng) for _ in range(6)]
    vectors += [vectors[2], net.space.narrower(net.space.largest, net.space.names[-1]), net.space.largest]
    shared, plain, judge = compare(net, vectors)
    assert shared == plain
    assert judge.unshared == ""


def test_shared_losses_are_bit_identical_with_control_flow():
    """Candidates differ in the way they take, which the loop shows that is watched."""
    net = chain(kind=Branching)
    vectors = steps(net)
    MEANS.clear()
    dict(Evaluator(net, [batch()], F.cross_entropy, share=False).judge_many(vectors))
    net.model.most = float(np.median(MEANS))
    shared, plain, judge = compare(net, vectors)
    assert shared == plain
    assert judge.unshared == ""
    TAKEN.clear()
    for widths in vectors:
        judge(widths)
    ways = {tuple(TAKEN[i : i + 5]) for i in range(0, len(TAKEN), 5)}
    assert len(ways) > 1


# --- what is saved ----------------------------------------------------------------------------------------------------


def test_what_lies_before_the_first_change_runs_once():
    net = chain(lambda self, x, i: torch.ops.widthkit_test.counted(x, i))
    vectors = steps(net)
    MADE.clear()
    shared, plain, judge = compare(net, vectors)
    n = len(vectors)
    assert n == 5
    assert judge.unshared == ""
    assert shared == plain
    together = MADE[: -n * 5]
    # Candidate i changes layer i: its own runs of layers i and later, and layers before the last change once.
    assert sorted(together) == sorted([place for i in range(n) for place in range(i, 5)] + [0, 1, 2, 3])


def test_the_bounds_are_those_of_a_count_by_hand():
    net = chain()
    macs = net.graph.cost.macs_polynomial.per_term(net.graph.vector())
    vectors = steps(net)
    total, behind = 0, 0
    for i, widths in enumerate(vectors):
        layers = net.graph.cost.macs_polynomial.per_term(net.graph.vector(widths))
        total += sum(layers)
        behind += sum(layers[i:])
    assert bounds(net.graph, vectors) == (total / behind, total / (behind + sum(macs[: len(vectors) - 1])))


def test_neighbours_share_the_most():
    net = chain()
    vectors = steps(net)[::-1]
    assert sharing_order(net, vectors) == [4, 3, 2, 1, 0]


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0, 20_000, 60_000, 150_000])
def test_the_memory_stays_below_its_cap_and_nothing_changes(memory):
    """Below one activation (12 kB here), around one batch's, around all batches' of both paths."""
    net = chain(strategy="bc")
    vectors = steps(net)
    shared, plain, judge = compare(net, vectors, batch_size=2, memory=memory)
    assert len(judge.batches) == 3
    assert shared == plain
    assert judge.unshared == ""
    assert judge.peak_bytes <= memory
    assert (judge.peak_bytes > 0) == (memory > 0)


def test_where_memory_is_short_some_are_judged_together_batch_by_batch():
    """With room for two of three batches' values, every shared operator runs once per batch and block."""
    net = chain(lambda self, x, i: torch.ops.widthkit_test.counted(x, i))
    full = net.space.largest
    vectors = [full, *(full | {g.name: option} for g in net.space.groups for option in g.options[:-1])]
    runs, ends = [], []
    net.model.register_forward_hook(lambda *_: runs.append(0))
    keys = sorted(tuple(v.values()) for v in vectors)
    ample = Evaluator(net, [batch()], F.cross_entropy, Judging(batch_size=2))
    MADE.clear()
    expected = dict(ample.judge_many(vectors))
    assert len(MADE) == 3 * len(beginnings(keys))
    memory = 2 * ample.peak_bytes // 3
    judge = Evaluator(net, [batch()], F.cross_entropy, Judging(batch_size=2, memory=memory))
    MADE.clear(), runs.clear()
    found = {}
    for place, judgement in judge.judge_many(vectors):
        found[place] = judgement
        ends.append(len(runs) // 3)
    assert found == expected
    assert judge.unshared == ""
    assert 0 < judge.peak_bytes <= memory
    # One by one while the memory lasts; then eight together.
    alone = ends.index(ends[-1]) - BLOCK
    assert ends == [*range(1, alone + 1), *[alone + BLOCK] * BLOCK, *[len(keys)] * (len(keys) - alone - BLOCK)]
    blocks = [keys[:alone], keys[alone : alone + BLOCK], keys[alone + BLOCK :]]
    assert len(MADE) == 3 * sum(len(beginnings(block)) for block in blocks)


def beginnings(keys):
    """The values of a layer depend on the widths up to it: of each such beginning there is one run."""
    return {key[: i + 1] for key in keys for i in range(len(key))}


@pytest.mark.parametrize("strategy", ["ua", "bc"])
def test_judgements_come_one_by_one_in_the_order_of_sharing(strategy):
    """So a search that is killed loses what is in flight only."""
    net = chain(strategy=strategy)
    vectors = steps(net)[::-1]
    judge, runs = Evaluator(net, [batch()], F.cross_entropy), []
    net.model.register_forward_hook(lambda *_: runs.append(0))
    came = []
    for place, _ in judge.judge_many(vectors):
        came.append(place)
        assert len(runs) == len(came) * len(net.paths(vectors[0]))
    assert came == sharing_order(net, vectors)


def test_nothing_stays_behind():
    net = chain()
    judge = Evaluator(net, [batch()], F.cross_entropy)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    list(judge.judge_many(steps(net)))
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is StandIn]
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert all(type(p) is nn.Parameter for p in net.model.parameters())


@pytest.mark.parametrize("text", ["", "lots", "-1GB", "2XB", "2Mb", "@", -1])
def test_amounts_of_memory_that_make_no_sense(text):
    with pytest.raises(OptionError, match="memory"):
        Judging(memory=text)


def test_amounts_of_memory_are_read_as_budgets_are():
    graph = small_graph()
    for text in ("2GB", "1.5 MiB", "300kB", "2.3e6B"):
        assert Judging(memory=text).memory_bytes == parse_budget(text, graph).limits[0].value
    assert Judging(memory="5M").memory_bytes == Judging(memory=5 * 10**6).memory_bytes == 5 * 10**6


# --- where sharing is unsafe ------------------------------------------------------------------------------------------


def dropping(self, x, i):
    return F.dropout(x, 0.5, training=True)


def late_noise(self, x, i):
    return x + torch.rand_like(x) if i == 3 else x


def python_noise(self, x, i):
    return x * (1 + random.random())


def numpy_noise(self, x, i):
    return x * float(np.random.uniform(1, 2))


def half_written(self, x, i):
    x[:, :, 0] *= 2
    return x


def own_tensor(self, x, i):
    self.layers[i].bias.add_(0.01)
    return x


def own_statistics(self, x, i):
    return x + self.norms[i].running_mean.mean()


def to_numpy(self, x, i):
    return x + float(x.numpy().max())


DRAWS = {f.__name__: f for f in (dropping, late_noise, python_noise, numpy_noise)}
UNSAFE = {
    half_written: "writes to a tensor that others are views of",
    own_statistics: "running statistics of a batch norm are used by something else",
    to_numpy: "numpy",
}


@pytest.mark.parametrize("name", DRAWS)
def test_networks_that_draw_random_numbers_draw_the_same_shared_or_not(name):
    """Every run is seeded, whatever the state of the global generators; these stay as they are."""
    net = chain(DRAWS[name])
    vectors = steps(net)[::-1]
    found = []
    for seed, share in ((7, True), (8, False), (9, True)):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        judge = Evaluator(net, [batch()], F.cross_entropy, share=share)
        found.append(dict(judge.judge_many(vectors)))
        assert judge.unshared == ""
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), str(np.random.get_state())) == states[1:]
    assert found[0] == found[1] == found[2]
    assert [found[0][i] for i in range(len(vectors))] == [judge(v) for v in vectors]


def test_what_draws_nothing_is_shared_before_the_first_draw():
    def extra(self, x, i):
        x = torch.ops.widthkit_test.counted(x, i)
        return late_noise(self, x, i)

    net = chain(extra)
    MADE.clear()
    dict(Evaluator(net, [batch()], F.cross_entropy).judge_many(steps(net)))
    assert [MADE.count(place) for place in range(5)] == [2, 3, 4, 5, 5]


@pytest.mark.parametrize("extra", UNSAFE, ids=lambda f: f.__name__)
def test_what_cannot_be_shared_is_run_plainly(extra):
    """And the reason is told."""
    net = chain(extra)
    shared, plain, judge = compare(net, steps(net)[::-1])
    assert shared == plain
    assert UNSAFE[extra] in judge.unshared
    assert "\n" not in judge.unshared


@pytest.mark.parametrize("searcher", ["greedy", "guided"])
def test_a_result_says_why_candidates_could_not_share(searcher):
    net = chain(own_statistics)
    result = search(net, [batch()], "0.5x", searcher, loss=F.cross_entropy, progress=False)
    assert result.notes == [
        "candidates were judged one by one, because they cannot share what they have in common: "
        "running statistics of a batch norm are used by something else"
    ]
    assert search(chain(), [batch()], "0.5x", searcher, loss=F.cross_entropy, progress=False).notes == []


def test_a_model_that_changes_itself_is_run_plainly():
    one, other = chain(own_tensor), chain(own_tensor)
    together = Evaluator(one, [batch()], F.cross_entropy)
    shared = dict(together.judge_many(steps(one)[::-1]))
    plain = dict(Evaluator(other, [batch()], F.cross_entropy, share=False).judge_many(steps(other)[::-1]))
    assert shared == plain
    assert together.unshared


def test_a_batch_that_is_written_to_is_run_plainly():
    class Writes(Chain):
        def forward(self, x):
            return super().forward(x.mul_(1.01))

    def judged(share):
        torch.manual_seed(1)
        net = make_supernet(Writes(), "ua", graph=trace(Chain(), (1, 3, SIZE, SIZE)), k=4)
        judge = Evaluator(net, [tuple(t.clone() for t in batch())], F.cross_entropy, share=share)
        return dict(judge.judge_many(steps(net)[::-1])), judge.unshared

    assert judged(True)[0] == judged(False)[0]
    assert judged(True)[1]


def written_view(self, x, i):
    y = x.flatten(2)
    del x
    y.mul_(1.5)
    return y.unflatten(2, (SIZE, SIZE))


def written_twice(self, x, i):
    z = x * 1
    z += x
    z.clamp_(max=2.0)
    return z + x


def put_aside(self, x, i):
    if getattr(self, "aside", None) is None:
        self.aside = x.mean()
    return x + self.aside.to(x.dtype)


@pytest.mark.parametrize("extra", [written_view, written_twice])
@pytest.mark.parametrize("memory", ["1GB", "0B"])
def test_writing_in_place_is_shared_where_it_is_safe(extra, memory):
    net = chain(extra)
    shared, plain, _ = compare(net, steps(net), memory=memory)
    assert shared == plain


def test_tensors_that_a_model_puts_aside_keep_their_values():
    one, other = chain(put_aside), chain(put_aside)
    shared = dict(Evaluator(one, [batch()], F.cross_entropy).judge_many(steps(one)))
    plain = dict(Evaluator(other, [batch()], F.cross_entropy, share=False).judge_many(steps(other)))
    assert shared == plain


def test_a_batch_norm_that_counts_its_batches_is_shared():
    net = chain(norm=lambda n: nn.BatchNorm2d(n, momentum=None))
    shared, plain, judge = compare(net, steps(net))
    assert shared == plain
    assert judge.unshared == ""


def test_a_model_that_fails_fails_as_it_does_alone():
    def broken(self, x, i):
        raise RuntimeError("broken on purpose")

    net = chain(broken)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        list(Evaluator(net, [batch()], F.cross_entropy).judge_many(steps(net)))
