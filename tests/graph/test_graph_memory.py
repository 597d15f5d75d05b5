"""Memory of any widths against what a real run of the dense network of those widths keeps alive."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from topologies import CASES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from widthkit.errors import BudgetError
from widthkit.export import export
from widthkit.trace import trace


class Ledger(TorchDispatchMode):
    """Adds up the storages that are alive after every operator; finalizers of their Python objects take them off."""

    def __init__(self, model, inputs):
        super().__init__()
        self.own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        self.alive = {}
        self.peak = 0
        self.watched = []
        self._note([inputs])

    def _note(self, tensors):
        for t in tensors:
            storage = t.untyped_storage()
            if storage.data_ptr() not in self.own and storage.nbytes():
                self.alive[storage.data_ptr()] = self.alive.get(storage.data_ptr()) or [storage.nbytes(), set()]
                self.alive[storage.data_ptr()][1].add(id(t))
                weakref.finalize(t, self._drop, storage.data_ptr(), id(t))

    def _drop(self, pointer, key):
        entry = self.alive.get(pointer)
        if entry is not None:
            entry[1].discard(key)
            if not entry[1]:
                del self.alive[pointer]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        flat = out if isinstance(out, (tuple, list)) else [out]
        self._note([t for t in flat if isinstance(t, torch.Tensor)])
        self.peak = max(self.peak, sum(n_bytes for n_bytes, _ in self.alive.values()))
        return out


def measured(model, inputs):
    """Peak bytes of inputs and activations: every tensor object counts as long as Python holds it."""
    with torch.inference_mode(), Ledger(model, inputs) as ledger:
        model(inputs)
    return ledger.peak


def weight_bytes(model):
    return sum(
        t.numel() * t.element_size() for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
    )


def widths_to_try(graph, n=3):
    rng = np.random.default_rng(0)
    yield graph.full
    yield dict.fromkeys(graph.full, 1)
    for _ in range(n):
        yield {name: int(rng.integers(1, width + 1)) for name, width in graph.full.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory_of_small_networks_is_what_a_run_keeps_alive(case):
    """Residual, concat, split, shuffle, squeeze-and-excitation, flatten...: every width and two batch sizes."""
    model = case.model()
    graph = trace(model, case.shape)
    for batch in (case.shape[0], 3 * case.shape[0]):
        for widths in widths_to_try(graph):
            dense = export(model, widths, graph=graph)
            inputs = torch.randn(batch, *case.shape[1:], dtype=torch.float64)
            assert graph.memory_model.activations(graph.vector(widths), batch=batch) == measured(dense, inputs)
            assert graph.memory_model.weights(graph.vector(widths)) == weight_bytes(dense)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_memory_of_real_networks(name):
    model = torchvision.models.get_model(name).eval()
    graph = trace(model, (1, 3, 64, 64))
    for batch, widths in ((1, graph.full), (3, {n: max(1, w // 3) for n, w in graph.full.items()})):
        dense = export(model, widths, graph=graph)
        real = measured(dense, torch.randn(batch, 3, 64, 64)) + weight_bytes(dense)
        assert graph.memory(widths, batch=batch) == real


def test_a_chain_by_hand():
    """4 bytes a number; after the second convolution input, first result and second result are alive."""
    graph = trace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1)), (1, 3, 10, 10))
    for w in range(1, 9):
        weights = 4 * (3 * w + w + 4 * w + 4)
        assert graph.memory({"0": w}) == weights + 400 * (3 + w + 4)
        assert graph.memory({"0": w}, batch=7) == weights + 7 * 400 * (3 + w + 4)
        assert graph.memory({"0": w}, dtype="bfloat16") == (weights + 400 * (3 + w + 4)) // 2


def test_in_place_operators_and_views_allocate_nothing():
    def peak(act):
        net = nn.Sequential(nn.Conv2d(3, 16, 1), act, nn.Flatten(2), nn.Unflatten(2, (4, 4)))
        graph = trace(net, (1, 3, 4, 4))
        return graph.memory_model.activations(graph.vector())

    assert peak(nn.ReLU(inplace=True)) == 64 * (3 + 16)
    assert peak(nn.ReLU()) == 64 * (3 + 16 + 16)


def test_max_pooling_counts_its_indices():
    graph = trace(nn.Sequential(nn.Conv2d(3, 16, 1), nn.MaxPool2d(2), nn.Conv2d(16, 2, 1)), (1, 3, 8, 8))
    for w in range(1, 17):
        # input, convolved, pooled as 4 bytes, indices as 8 bytes
        assert graph.memory_model.activations(graph.vector({"0": w})) == 4 * 64 * (3 + w) + (4 + 8) * 16 * w


def test_what_a_caller_holds_counts_as_in_python():
    """The shortcut stays alive until it is added, however far away that is."""

    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.wide, self.narrow = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 1)

        def forward(self, x):
            x = self.first(x)
            return x + self.narrow(F.relu_(self.wide(x)))

    graph = trace(Long(), (1, 3, 4, 4), freeze=["first"])
    assert graph.memory_model.activations(graph.vector({"wide": 10})) == 64 * (3 + 8 + 10 + 8)
    assert graph.memory_model.activations(graph.vector({"wide": 1})) == 64 * (3 + 8 + 8 + 8)


def test_many_vectors_at_once_are_the_single_ones():
    graph = trace(torchvision.models.resnet18(), (1, 3, 64, 64))
    many = list(widths_to_try(graph, 30))
    assert graph.memory(many, batch=2).tolist() == [graph.memory(w, batch=2) for w in many]
    assert isinstance(graph.memory(), int)


def test_the_peak_is_at_the_call_that_is_named():
    graph = trace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 20, 1), nn.Conv2d(20, 4, 1)), (1, 3, 4, 4))
    call = graph.memory_model.peak_call(graph.vector())
    assert graph.program.calls[call].module == "1"
    assert graph.program.calls[graph.memory_model.peak_call(graph.vector({"0": 2}))].module == "2"


class OneExample(nn.Module):
    """Runs with one image alone: its reshape has the number inside."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(self.conv(x)).reshape(2, 16)


def test_a_model_that_runs_at_one_batch_size_is_known_at_that_one_alone():
    graph = trace(OneExample(), (1, 3, 4, 4))
    assert graph.memory() > 0
    with pytest.raises(BudgetError, match=r"traced at batch size 1 and does not run alike at 2 \(RuntimeError: shape"):
        graph.memory(batch=4)


def test_sizes_that_do_not_follow_the_batch():
    """A table made in the run has the size of one, whatever the batch."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            rates = torch.arange(64, dtype=torch.float32, device=x.device).reshape(1, 1, 8, 8)
            return self.conv(x) * rates

    graph = trace(Table(), (1, 3, 8, 8), free_outputs=True)
    for batch in (1, 4):
        expected = 4 * (64 + batch * 64 * (3 + 8 + 8))
        assert graph.memory_model.activations(graph.vector(), batch=batch) == expected
