"""The whole job in stages that leave their results in one folder and can be resumed.

========================  =============================================================
``run.json``              what was asked for
``supernet/``             checkpoint of the supernet's training, and the widths that trained best
``search.json``           widths, score, history
``stage-N/``              supernet and search of a stage, where there are several
``final/``                checkpoints of the final trainings
``slim.safetensors``      the slim network, with ``slim.json``
``results.json``          the table: dense, uniform, searched
========================  =============================================================
"""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from torch.utils.data import Subset

from widthkit.budget import Budget, Limit, parse_budget
from widthkit.errors import CheckpointError, OptionError
from widthkit.export import check_same, export, save
from widthkit.files import atomic_json
from widthkit.graph import ChannelGraph
from widthkit.graph.plan import kept_units
from widthkit.graph.space import uniform_space
from widthkit.latency.slow_layers import is_slow, slow_layers, time_layers
from widthkit.latency.timing import forward_latency
from widthkit.modules.models import create_model, input_channels
from widthkit.run.stages import StagePlan, next_supernet, run_stages
from widthkit.search import SEARCHERS, SearchResult, search
from widthkit.search.build import make_searcher
from widthkit.search.guided import make_guidance, make_model
from widthkit.search.measured import describe_rows, network_of
from widthkit.search.sharing import parse_memory
from widthkit.search.uniform import uniform_widths
from widthkit.supernet import Supernet, make_supernet
from widthkit.supernet.strategy import make_strategy
from widthkit.trace import trace
from widthkit.train import DataSplits, evaluate, load_data, make_loader, recalibrate, train
from widthkit.train.engine import check_engine
from widthkit.train.optim import make_optimizer
from widthkit.train.settings import Settings
from widthkit.version import versions

Say = Callable[[str], None]
_SMALLEST_IMAGE = 32


class RunConfig(BaseModel):
    """Everything a run depends on; two runs with equal settings on one machine give equal results.

    Attributes:
        model: Name of the dense model.
        model_options: Arguments of its factory.
        pretrained: Start the supernet from the library's weights.
        rank: Order units by this importance before they are shared; for pretrained models.
        rank_images: Training images for the importance criteria that need gradients.
        data: Data source.
        data_dir: Folder of the data source.
        image_size: Side length that images are resized to; their own, but at least 32, when not given.
        limit: Most images per part of the data.
        augment: Random crops and flips while training.
        strategy: Sharing strategy.
        strategy_options: Its options.
        searcher: Searcher.
        searcher_options: Its options.
        search_images: Held-out images that every candidate is judged on, at most.
        score_model: Score model that smooths the supernet's scores; ``auto`` for the default, ``none`` for none.
        score_model_options: Its options.
        evaluations: With a score model, networks that the supernet judges; the searcher's own number by default.
        calibrate: With a score model, networks that are trained on their own.
        calibrate_epochs: Epochs of each of these trainings.
        search_memory: Most memory for what candidates that are judged together share.
        budget: What the slim network may cost.
        k: Evenly spaced choices per group.
        bins: FLOPs-sensitive bins with this beta, instead of ``k``.
        min_width: Narrowest width.
        max_width: Widest width.
        divisor: Widths are multiples of this.
        fixed: Group name -> the one width that it keeps.
        freeze: Modules whose output widths stay.
        stages: Search in so many stages with evolving bins; needs ``bins``, the first stage's.
        alpha: Bins get finer by this factor from stage to stage.
        epochs: Epochs of the supernet.
        final_epochs: Epochs of the final trainings.
        seeds: How many final trainings of each network.
        init: Final trainings start from fresh weights (``scratch``) or from the supernet's (``inherit``).
        batch_size: Images per step.
        optimizer: timm optimiser.
        lr: Learning rate.
        weight_decay: Weight decay.
        schedule: Learning-rate schedule.
        clip_grad: Largest gradient norm; narrow sub-networks of a fresh supernet have steep losses.
        mixed_precision: ``no``, ``bf16`` or ``fp16``.
        device: Where to run; Accelerate's choice by default.
        seed: Seed of everything.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    model_options: dict[str, Any] = {}
    pretrained: bool = False
    rank: str | None = None
    rank_images: int = Field(default=256, ge=1)
    data: str
    data_dir: str | None = None
    image_size: int | None = None
    limit: int | None = None
    augment: bool = False
    strategy: str = "bc"
    strategy_options: dict[str, Any] = {}
    searcher: str = "greedy"
    searcher_options: dict[str, Any] = {}
    search_images: int = Field(default=2048, ge=1)
    score_model: str = "auto"
    score_model_options: dict[str, Any] = {}
    evaluations: int | None = None
    calibrate: int = 0
    calibrate_epochs: int = Field(default=2, ge=1)
    search_memory: str = "2GB"
    budget: str = "0.5x"
    k: int = 10
    bins: float | None = None
    min_width: str = "0.1x"
    max_width: str = "1x"
    divisor: int = 1
    fixed: dict[str, int] = {}
    freeze: list[str] = []
    stages: int = 1
    alpha: float = 2.0
    epochs: int = 10
    final_epochs: int = 10
    seeds: int = 1
    init: str = "scratch"
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.05
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    clip_grad: float | None = 5.0
    mixed_precision: str = "no"
    device: str | None = None
    seed: int = 0

    def training(self) -> dict[str, Any]:
        """The settings that every training of the run shares."""
        names = ("optimizer", "lr", "weight_decay", "schedule", "clip_grad", "mixed_precision", "device")
        return {name: getattr(self, name) for name in names}


class Folder:
    """The folder of one run.

    Args:
        path: Where the run lives.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config_file(self) -> Path:
        """``run.json``."""
        return self.path / "run.json"

    def begin(self, config: RunConfig, resume: bool) -> None:
        """Claim the folder for a run.

        Raises:
            OptionError: If it holds another run, or this one and ``resume`` was not asked for.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OptionError(f"{self.path} is a file; --out needs a folder")
        if self.config_file.exists() and self._has_results():
            if not resume:
                raise OptionError(f"{self.path} already holds a run; pass --resume to continue it or another --out")
            self._same(config)
        else:
            atomic_json(self.config_file, {"format": 1, **config.model_dump()})

    @property
    def finished(self) -> bool:
        """Whether the final trainings are done: ``slim.safetensors`` then holds their network."""
        return (self.path / "results.json").exists() and (self.path / "slim.json").exists()

    def _has_results(self) -> bool:
        """Whether anything beside the settings is here that another run would mix with."""
        return any(self.path.glob("*/**/*.safetensors")) or any(self.path.glob("search*.json*"))

    def _same(self, config: RunConfig) -> None:
        old, new = self.config().model_dump(), config.model_dump()
        for name, value in new.items():
            if old[name] != value:
                raise OptionError(
                    f"{self.path} holds a run with {name}={old[name]!r}, not {value!r}; use the same settings to resume"
                )

    def config(self) -> RunConfig:
        """Read the run's settings.

        Raises:
            CheckpointError: If there are none or they are damaged.
        """
        try:
            raw = json.loads(self.config_file.read_text(encoding="utf-8"))
            raw.pop("format")
            return RunConfig(**raw)
        except FileNotFoundError:
            raise CheckpointError(f"{self.path} holds no run (no run.json); start one with widthkit train") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
            why = " ".join(str(error).split())[:120]
            raise CheckpointError(f"{self.config_file} is damaged ({why}); start another run") from error

    def fresh_search(self, resume: bool) -> None:
        """Make room for a search.

        Raises:
            OptionError: If there is a result or a journal already and ``resume`` was not asked for.
        """
        earlier = [*self.path.glob("search*.json*"), *self.path.glob("stage-*/search*.json*")]
        if not resume and earlier:
            raise OptionError(
                f"{self.path} already holds a search; pass --resume to continue it or delete search*.json* and stage-*"
            )

    def result(self) -> SearchResult:
        """Read the search's result.

        Raises:
            CheckpointError: If there is none or it is damaged.
        """
        file = self.path / "search.json"
        if not file.exists():
            raise CheckpointError(f"{self.path} holds no search result; run widthkit search first")
        return SearchResult.load(file)


class Job:
    """One run: the stages in order, each using what the earlier ones left in the folder.

    Args:
        config: The settings.
        folder: Where results go.
        say: Called with one line per stage.
        progress: Show progress bars.
    """

    def __init__(self, config: RunConfig, folder: Folder, say: Say | None = None, progress: bool = True) -> None:
        self.config = config
        self.folder = folder
        self.say = say or (lambda line: print(line, file=sys.stderr))
        self.progress = progress
        self.data: DataSplits | None = None

    def check(self, search: bool = True, final: bool = False) -> tuple[Supernet, DataSplits]:
        """Build everything that can be refused before anything is written or trained.

        Args:
            search: A search follows; its budget, searcher and options are checked too.
            final: Final trainings follow; their settings are checked too.

        Returns:
            The untrained supernet and the data.

        Raises:
            WidthkitError: If a setting makes no sense here.
        """
        config = self.config
        if config.init not in ("scratch", "inherit"):
            raise OptionError(f"init '{config.init}': final trainings start from 'scratch' or 'inherit'")
        if config.seeds < 1 or config.final_epochs < 0:
            raise OptionError("seeds must be at least 1 and final epochs at least 0")
        SEARCHERS.get(config.searcher)
        parse_memory(config.search_memory)
        self._settings(config.epochs).check()
        if final and config.final_epochs:
            self._settings(config.final_epochs).check()
        check_engine(config.mixed_precision, config.device)
        data = self._load_data()
        model = self.fresh_model(data, config.seed, pretrained=config.pretrained)
        graph = trace(model, self.input_shape(data), freeze=config.freeze)
        net = make_supernet(
            model,
            make_strategy(config.strategy, config.strategy_options).for_budget(config.budget),
            graph=graph,
            k=config.k,
            bins=config.bins,
            min_width=config.min_width,
            max_width=config.max_width,
            divisor=config.divisor,
            fixed=config.fixed,
            seed=config.seed,
            rank=config.rank,
            rank_data=self._rank_batches(data) if config.rank else None,
        )
        make_optimizer(net, self._settings(config.epochs))
        make_loader(data.train, config.batch_size, train=True)
        if search:
            budget = self._budget(net)
            self._stage_plan(net).check(net.space)
            make_searcher(config.searcher, net, budget, np.random.default_rng(config.seed), config.searcher_options)
            self._guidance(net)
        return net, data

    def _guidance(self, net: Supernet) -> None:
        """Refuse a score model or its options before anything is trained."""
        c = self.config
        chosen = None if c.score_model == "none" else c.score_model
        guidance = make_guidance(
            chosen, SEARCHERS.get(c.searcher), c.evaluations, c.calibrate, lambda widths: 0.0, c.score_model_options
        )
        if guidance is not None:
            make_model(guidance, net.space)
        if c.calibrate:
            self._settings(c.calibrate_epochs).check()

    def _budget(self, net: Supernet) -> Budget:
        return parse_budget(self.config.budget, net.graph, lambda widths: network_of(net, widths))

    def _uniform(self, net: Supernet, macs: int) -> dict[str, int]:
        """Shrink uniformly to the searched network's MACs, or as far as a budget in memory or latency allows."""
        budget = self._budget(net)
        if any(limit.kind in ("memory", "latency") for limit in budget.limits):
            return uniform_widths(net.space, budget)
        return self.uniform(net.graph, macs)

    def _rank_batches(self, data: DataSplits) -> Iterable[Any]:
        count = min(self.config.rank_images, len(data.train))  # type: ignore[arg-type]
        return make_loader(Subset(data.train, range(count)), self.config.batch_size, train=False)

    def _settings(self, epochs: int) -> Settings:
        options = {name: value for name, value in self.config.training().items() if name != "device"}
        return Settings(epochs=epochs, momentum=0.9, warmup_epochs=0, seed=self.config.seed, **options)

    def _load_data(self) -> DataSplits:
        if self.data is None:
            channels = input_channels(create_model(self.config.model, **self.config.model_options))
            self.data = self._read_data(self.config.image_size, channels)
            if self.config.image_size is None and min(self.data.native_size) < _SMALLEST_IMAGE:
                # Networks that halve their input five times have nothing left to see of an 8x8 image.
                self.data = self._read_data(_SMALLEST_IMAGE, channels)
        return self.data

    def _read_data(self, image_size: int | None, channels: int) -> DataSplits:
        c = self.config
        return load_data(
            c.data,
            data_dir=c.data_dir,
            image_size=image_size,
            in_channels=channels,
            seed=c.seed,
            limit=c.limit,
            augment=c.augment,
        )

    def fresh_model(self, data: DataSplits, seed: int, pretrained: bool = False) -> nn.Module:
        """Build the dense model for the data's classes, with weights drawn from a seed."""
        options = {"num_classes": data.num_classes, **self.config.model_options}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = create_model(self.config.model, **options)
        if pretrained:
            load_matching(model, create_model(self.config.model, pretrained=True, **self.config.model_options))
        return model

    def input_shape(self, data: DataSplits, batch: int = 1) -> tuple[int, ...]:
        """Shape of a batch of the data's images."""
        return (batch, *data.train[0][0].shape)

    def require_supernet(self) -> None:
        """Refuse to go on without a trained supernet.

        Raises:
            CheckpointError: If the folder holds none.
        """
        if not (self.folder.path / "supernet" / "checkpoint.safetensors").exists():
            raise CheckpointError(f"{self.folder.path} holds no trained supernet; run widthkit train first")

    def export_slim(
        self, widths: dict[str, int], path: Path, formats: Sequence[str] = ("safetensors",), **form: Any
    ) -> tuple[Path, ...]:
        """Write the network of given widths with the supernet's weights, its batch norms recalibrated.

        Args:
            widths: Group name -> width.
            path: Where to write.
            formats: As in :func:`widthkit.save`.
            **form: ``dtype``, ``channels_last``, ``fold_bn`` and ``device``, as there.

        Raises:
            ExportError: If the network computes something else than the supernet at these widths, or a file
                something else than the network; nothing is written then.
        """
        net, data = self.check(search=False)
        kept_units(net.graph, widths)
        self.train_supernet(net, data)
        heir = self._heir(net, data, widths)
        slim = export(heir, widths)
        images = torch.stack([data.valid[i][0] for i in range(2)])
        # Before recalibration: the supernet's statistics are still the slim network's.
        same = check_same(heir.set_widths(widths), slim, images, name="the slim network")
        self.say(f"slim: largest difference from the supernet {same.largest_difference:.2g}")
        recalibrate(slim, make_loader(data.train, self.config.batch_size, train=False))
        return save(
            slim.cpu(),
            path,
            formats=formats,
            model=self.config.model,
            kwargs=self._kwargs(data),
            example_inputs=images,
            say=self.say,
            **form,
        )

    def train_supernet(self, net: Supernet, data: DataSplits, stage: int = 1) -> None:
        """Train the supernet (of one stage, where there are several), or continue."""
        c = self.config
        folder = self.folder.path / f"stage-{stage}" / "supernet" if stage > 1 else self.folder.path / "supernet"
        options = str(net.strategy).removeprefix(type(net.strategy).__name__)
        size = f"{len(net.space.groups)} groups, {net.space.size:.3g} width vectors"
        self.say(f"supernet: {self.config.strategy}{options}, {size}")
        loader = make_loader(data.train, c.batch_size, train=True, seed=c.seed)
        result = train(
            net,
            loader,
            c.epochs,
            seed=c.seed,
            out=folder,
            resume=True,
            progress=self.progress,
            **c.training(),
        )
        records = [{"widths": widths, "loss": loss} for widths, loss in net.width_history.records]
        atomic_json(folder / "widths.json", {"format": 1, "least_loss_first": records})
        self.say(f"supernet: trained {result.epochs} epochs, loss {result.loss:.4f}")

    def search_widths(self, net: Supernet, data: DataSplits) -> SearchResult:
        """Search in a trained supernet, or continue; with several stages the later supernets are trained on the way."""
        if self.config.stages == 1:
            return self._search(net, data, self._budget(net), self.folder.path)
        plan = self._stage_plan(net)

        def train_stage(net: Supernet, stage: int) -> None:
            if stage > 1:
                self.train_supernet(net, data, stage)

        def search_stage(net: Supernet, budget: Budget, stage: int) -> SearchResult:
            last = stage == plan.stages
            return self._search(net, data, budget, self.folder.path if last else self.folder.path / f"stage-{stage}")

        result = run_stages(net, plan, train_stage, search_stage).result
        result.save(self.folder.path / "search.json")
        return result

    def _stage_plan(self, net: Supernet) -> StagePlan:
        c = self.config
        if c.stages != 1 and c.bins is None:
            raise OptionError("a search in stages needs FLOPs-sensitive bins; train the supernet with --bins")
        budget = self._budget(net)
        return StagePlan(budget, c.stages, c.alpha, c.bins or 1.0, c.min_width, c.divisor, c.fixed)

    def _heir(self, net: Supernet, data: DataSplits, widths: Mapping[str, int]) -> Supernet:
        """Return the trained supernet whose weights these widths take: the last stage's for what it found."""
        file = self.folder.path / "search.json"
        result = SearchResult.load(file) if file.exists() else None
        rows = result.settings.get("stages", []) if result is not None and result.widths == dict(widths) else []
        plan = self._stage_plan(net) if rows else None
        heir = net
        for before, row in itertools.pairwise(rows):
            assert plan is not None
            plan = replace(plan, stages=len(rows), alpha=before["beta"] / row["beta"])
            heir = next_supernet(heir, before["widths"], plan, row["stage"], net)
            self.train_supernet(heir, data, row["stage"])
        return heir

    def _search(self, net: Supernet, data: DataSplits, budget: Budget, folder: Path) -> SearchResult:
        c = self.config
        # The parts of the data interleave their classes, so the first images are a fair sample.
        count = min(c.search_images, len(data.valid))  # type: ignore[arg-type]
        images = Subset(data.valid, range(count))
        loader = make_loader(images, 512, train=False)
        result = search(
            net,
            loader,
            budget,
            c.searcher,
            seed=c.seed,
            out=folder,
            resume=True,
            progress=self.progress,
            device=c.device,
            score_model=None if c.score_model == "none" else c.score_model,
            score_model_options=c.score_model_options,
            evaluations=c.evaluations,
            calibrate=c.calibrate,
            train_fn=lambda widths: self.stand_alone(widths, net, data),
            memory=c.search_memory,
            **c.searcher_options,
        )
        used = budget.usage(net.graph, result.widths)
        self.say(f"search: {len(result.trials)} networks judged; best uses {used:.1%} of the budget {budget}")
        if "remark" in result.settings:
            self.say(f"search: {result.settings['remark']}")
        for phrase in describe_rows(result.measured):
            self.say(f"search: {phrase}")
        return result

    def stand_alone(self, widths: dict[str, int], net: Supernet, data: DataSplits) -> float:
        """Train a network of given widths briefly from fresh weights, or continue; return its held-out accuracy."""
        c = self.config
        slim = export(self.fresh_model(data, c.seed), widths, graph=net.graph)
        name = hashlib.sha256(json.dumps(widths, sort_keys=True).encode()).hexdigest()[:16]
        loader = make_loader(data.train, c.batch_size, train=True, seed=c.seed)
        out = self.folder.path / "calibration" / name
        train(slim, loader, c.calibrate_epochs, seed=c.seed, out=out, resume=True, progress=False, **c.training())
        recalibrate(slim, make_loader(data.train, c.batch_size, train=False))
        found = evaluate(slim, make_loader(data.valid, 512, train=False), device=c.device)
        self.say(f"calibration: {net.graph.macs(widths) / net.graph.macs():.1%} of the MACs, {found['accuracy']:.2%}")
        return float(found["accuracy"])

    def final_network(self, name: str, widths: dict[str, int], net: Supernet, data: DataSplits, seed: int) -> nn.Module:
        """Train one network of given widths with one seed, or continue, and return it."""
        c = self.config
        if c.init == "inherit":
            slim = export(self._heir(net, data, widths), widths)
        else:
            slim = export(self.fresh_model(data, seed), widths, graph=net.graph)
        if c.final_epochs:
            train(
                slim,
                make_loader(data.train, c.batch_size, train=True, seed=seed),
                c.final_epochs,
                seed=seed,
                out=self.folder.path / "final" / f"{name}-{seed}",
                resume=True,
                progress=self.progress,
                **c.training(),
            )
        recalibrate(slim, make_loader(data.train, c.batch_size, train=False))
        return slim

    def run(self, net: Supernet, data: DataSplits) -> dict[str, Any]:
        """All stages, on what :meth:`check` built; returns what ``results.json`` holds."""
        self.train_supernet(net, data)
        result = self.search_widths(net, data)
        chosen = {
            "dense": net.graph.full,
            "uniform": self._uniform(net, result.macs),
            "searched": result.widths,
        }
        table, networks = [], {}
        for name, widths in chosen.items():
            row, networks[name] = self._final(name, widths, net, data)
            table.append(row)
        shape = self.input_shape(data, self.config.batch_size)
        device = self.config.device or "cpu"
        latency = forward_latency(networks, shape, device=device)
        for row in table:
            row["latency_ms"] = latency[row["network"]]
        self._blame(table, networks, shape, device)
        save(networks["searched"], self.folder.path / "slim", model=self.config.model, kwargs=self._kwargs(data))
        results = {
            "format": 1,
            "config": self.config.model_dump(),
            "versions": versions(),
            "latency": {"input_shape": list(shape), "device": device, "threads": torch.get_num_threads()},
            "table": table,
            "widths": chosen,
            "measured": result.measured,
            "notes": result.notes,
        }
        atomic_json(self.folder.path / "results.json", results)
        return results

    def _blame(
        self, table: list[dict[str, Any]], networks: dict[str, nn.Module], shape: tuple[int, ...], device: str
    ) -> None:
        """Name the layers that keep a network from being as fast as its MACs promise, in its row of the table."""
        dense = table[0]
        slow = [r for r in table if is_slow(dense["latency_ms"], r["latency_ms"], dense["macs"], r["macs"])]
        if slow:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
            usual = time_layers(networks["dense"].eval().to(device), x)
            for row in slow:
                layers = slow_layers(usual, time_layers(networks[row["network"]].eval().to(device), x))
                row["slow_layers"] = [layer.record() for layer in layers]

    def _kwargs(self, data: DataSplits) -> dict[str, Any]:
        return {"num_classes": data.num_classes, **self.config.model_options}

    def _final(
        self, name: str, widths: dict[str, int], net: Supernet, data: DataSplits
    ) -> tuple[dict[str, Any], nn.Module]:
        accuracies, networks = [], []
        for number in range(self.config.seeds):
            slim = self.final_network(name, widths, net, data, self.config.seed + number)
            score = evaluate(slim, make_loader(data.test, 512, train=False), device=self.config.device)
            accuracies.append(float(score["accuracy"]))
            networks.append(slim)
        row = {
            "network": name,
            "macs": net.graph.macs(widths),
            "params": net.graph.params(widths),
            "accuracy": accuracies,
            "accuracy_mean": statistics.fmean(accuracies),
            "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        }
        n = len(accuracies)
        self.say(f"{name}: accuracy {row['accuracy_mean']:.2%} over {n} training{'s' if n > 1 else ''}")
        return row, networks[0].cpu()

    def uniform(self, graph: ChannelGraph, macs: int) -> dict[str, int]:
        """Widths of the uniformly shrunk network that costs at most as many MACs as the searched one."""
        c = self.config
        # A narrowest width that is no multiple of the divisor would be dropped.
        low = c.divisor if c.divisor > 1 else "0.01x"
        space = uniform_space(graph, 1, min_width=low, max_width=c.max_width, divisor=c.divisor, fixed=c.fixed)
        return uniform_widths(space, Budget((Limit("macs", macs, f"{macs} MACs"),)))


def load_matching(model: nn.Module, pretrained: nn.Module) -> list[str]:
    """Copy every tensor whose name and shape agree; return the names that stay as they are (a new head's)."""
    source = pretrained.state_dict()
    own = model.state_dict()
    fitting = {n: t for n, t in source.items() if n in own and own[n].shape == t.shape}
    model.load_state_dict(fitting, strict=False)
    return sorted(set(own) - set(fitting))
