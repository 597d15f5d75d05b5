"""The records of one model: every stand-alone training and every supernet leaves one file of its own.

A killed run therefore continues where it was, and strategies that are added later share the stand-alone trainings.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from benchmarks.learn.widths import choose_widths
from benchmarks.nets import MODELS
from widthkit.bench.files import machine
from widthkit.errors import CheckpointError, OptionError, close_matches
from widthkit.export import export
from widthkit.files import atomic_json
from widthkit.graph import ChannelGraph
from widthkit.graph.space import SearchSpace, uniform_space
from widthkit.registry import PluginChoice
from widthkit.search.evaluator import Evaluator
from widthkit.search.judging import Judging
from widthkit.supernet import Supernet, make_supernet
from widthkit.trace import trace
from widthkit.train import DataSplits, evaluate, load_data, make_loader, train
from widthkit.train.losses import cross_entropy

Say = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """The settings that all records of one folder share.

    Args:
        model: A key of :data:`benchmarks.nets.MODELS`.
        data: Data set.
        train_images: Training images, for stand-alone networks and supernets alike.
        valid_images: Held-out images on which supernets are scored, in one batch.
        test_images: Images on which stand-alone networks are tested.
        epochs: Epochs of a stand-alone training.
        supernet_epochs: Epochs of a supernet.
        batch_size: Images per step.
        lr: Learning rate, falling to 0 along a cosine.
        clip_grad: Largest gradient norm.
        k: Choices per group.
        min_width: Narrowest width.
        n_widths: Width vectors that are compared.
        seeds: Stand-alone trainings of each.
    """

    model: str
    data: str = "fashion-mnist"
    train_images: int = 8000
    valid_images: int = 2000
    test_images: int = 5000
    epochs: int = 3
    supernet_epochs: int = 10
    batch_size: int = 64
    lr: float = 0.05
    clip_grad: float = 5.0
    k: int = 8
    min_width: str = "0.25x"
    n_widths: int = 24
    seeds: int = 2

    def fresh(self, seed: int) -> nn.Module:
        """Build the dense model with weights drawn from a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return MODELS[self.model]()


class Records:
    """The records of one model.

    Args:
        setup: The settings that they share.
        folder: Where they are.
        data_dir: Folder of the data set.
        say: Called with one line per record.

    Raises:
        OptionError: If the model is unknown, or the folder holds records of another setup.
    """

    def __init__(self, setup: Setup, folder: Path, data_dir: str | None, say: Say) -> None:
        if setup.model not in MODELS:
            raise OptionError(f"unknown model '{setup.model}': {close_matches(setup.model, MODELS)}")
        self.setup, self.folder, self.data_dir, self.say = setup, folder, data_dir, say
        file = folder / "setup.json"
        wanted = asdict(setup)
        stored = read_json(file) if file.exists() else wanted
        # More seeds only add records.
        if name := next((n for n in wanted if n != "seeds" and stored.get(n) != wanted[n]), None):
            raise OptionError(
                f"{folder} holds records with {name}={stored.get(name)!r}, not {wanted[name]!r}; "
                "use the same settings or another --out"
            )
        if not file.exists() or stored != wanted:
            atomic_json(file, wanted)

    @cached_property
    def data(self) -> DataSplits:
        """The data set, read when it is first needed."""
        return load_data(self.setup.data, data_dir=self.data_dir, in_channels=3)

    @cached_property
    def graph(self) -> ChannelGraph:
        """The model's channel graph, for the data's image size."""
        return trace(self.setup.fresh(0), (1, *self.data.train[0][0].shape))

    @property
    def space(self) -> SearchSpace:
        """The widths to choose from."""
        return uniform_space(self.graph, self.setup.k, min_width=self.setup.min_width)

    @cached_property
    def widths(self) -> tuple[list[dict[str, int]], list[bool]]:
        """The width vectors that are compared, and which of them have nearly equal MACs."""
        return choose_widths(self.space, self.setup.n_widths)

    def loader(self, part: str) -> DataLoader[Any]:
        """A loader of the first images of a part; the parts interleave their classes."""
        s = self.setup
        count = {"train": s.train_images, "valid": s.valid_images, "test": s.test_images}[part]
        dataset = getattr(self.data, part)
        images = Subset(dataset, range(min(count, len(dataset))))
        return make_loader(images, s.batch_size if part == "train" else 500, train=part == "train")

    def supernet(self, choice: PluginChoice) -> Supernet:
        """An untrained supernet of a strategy."""
        return make_supernet(self.setup.fresh(0), choice.name, graph=self.graph, space=self.space, **choice.options)

    def train_dense(self) -> None:
        """Train every width vector alone, with every seed; widths that have a record are skipped."""
        vectors, equal = self.widths
        for seed in range(self.setup.seeds):
            for number, widths in enumerate(vectors):
                file = self.folder / f"dense-{number:02d}-{seed}.json"
                if not file.exists():
                    atomic_json(file, {**self._dense(widths, seed), "equal_macs": equal[number]})
                    self.say(f"{self.setup.model}: {file.stem}, accuracy {read_json(file)['accuracy']:.2%}")

    def _dense(self, widths: Mapping[str, int], seed: int) -> dict[str, Any]:
        net = export(self.setup.fresh(seed + 1), widths, graph=self.graph)
        start = time.perf_counter()
        self._train(net, self.setup.epochs, seed)
        seconds = time.perf_counter() - start
        found = evaluate(net, self.loader("test"), device="cpu")
        return {
            "widths": dict(widths),
            "seed": seed,
            "macs": self.graph.macs(widths),
            "params": self.graph.params(widths),
            "accuracy": found["accuracy"],
            "loss": found["loss"],
            "seconds": seconds,
            "machine": machine(),
        }

    def train_supernet(self, choice: PluginChoice) -> None:
        """Train a strategy's supernet and score all width vectors in it, unless it has a record."""
        file = self.folder / f"{_record_name(choice)}.json"
        if file.exists():
            return
        net = self.supernet(choice)
        start = time.perf_counter()
        self._train(net, self.setup.supernet_epochs, 0, self.folder / _record_name(choice))
        seconds = time.perf_counter() - start
        judge = Evaluator(net, self.loader("valid"), cross_entropy(), Judging(self.setup.valid_images))
        judged = [judge(widths) for widths in self.widths[0]]
        record = {
            "strategy": choice.label,
            "repr": repr(net.strategy),
            "score": [j.score for j in judged],
            "accuracy": [j.accuracy for j in judged],
            "seconds": seconds,
            "machine": machine(),
        }
        atomic_json(file, record)
        self.say(f"{self.setup.model}: {file.stem}, trained in {seconds:.0f} s since the last start")

    def _train(self, net: nn.Module, epochs: int, seed: int, out: Path | None = None) -> None:
        train(
            net,
            self.loader("train"),
            epochs,
            lr=self.setup.lr,
            clip_grad=self.setup.clip_grad,
            seed=seed,
            device="cpu",
            out=out,
            resume=out is not None,
            progress=False,
        )


def _record_name(choice: PluginChoice) -> str:
    return "supernet-" + re.sub(r"[^A-Za-z0-9_.]+", "-", choice.label)


def read_json(file: Path) -> dict[str, Any]:
    """Read one record.

    Raises:
        CheckpointError: If it is damaged.
    """
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); delete it to make it anew") from error
    return found


def supernet_records(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of supernets in the order of their names."""
    for file in sorted(folder.glob("supernet-*.json")):
        yield read_json(file)
