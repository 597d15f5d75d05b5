"""The last step of a run: train the networks that are compared, measure them, write the table and the slim network."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch
from torch import nn

from widthkit.budget import Budget, Limit
from widthkit.export import export, save
from widthkit.files import atomic_json
from widthkit.graph.space import uniform_space
from widthkit.latency.slow_layers import is_slow, slow_layers, time_layers
from widthkit.latency.timing import forward_latency
from widthkit.run.build import Built
from widthkit.run.dense import has_trained_weights, input_shape, plain_model
from widthkit.run.steps import JUDGED_TOGETHER, supernet_at, train_by
from widthkit.search import SearchResult
from widthkit.search.resources import Resources, make_searcher
from widthkit.search.searcher import OneShotSearcher
from widthkit.search.uniform import uniform_widths
from widthkit.train import evaluate, make_loader, recalibrate
from widthkit.version import versions


def finish(built: Built, result: SearchResult) -> dict[str, Any]:
    """Train the networks that are compared, compare them, and write the searched one.

    The dense network comes first. One that was trained before the run is tested as it is.

    Args:
        built: What the run works with; its supernet is trained.
        result: What the search found.

    Returns:
        What ``results.json`` holds.
    """
    chosen = {
        "dense": built.net.graph.full,
        "uniform": uniform_baseline(built, result.macs),
        **{name: proposed(built, name) for name in built.config.compare},
        "searched": result.widths,
    }
    table: list[dict[str, Any]] = []
    networks: dict[str, nn.Module] = {}
    for name, widths in chosen.items():
        row, networks[name] = _compared(built, name, widths, networks.get("dense"))
        table.append(row)
    shape = input_shape(built.data, built.recipe.final.batch_size)
    device = built.config.device or "cpu"
    latency = forward_latency(networks, shape, device=device)
    for row in table:
        row["latency_ms"] = latency[row["network"]]
    _name_slow_layers(table, networks, shape, device)
    save(networks["searched"], built.folder.path / "slim", model=built.config.model, kwargs=built.factory_options)
    results = {
        "format": 1,
        "config": built.config.model_dump(),
        "recipe": built.recipe.model_dump(mode="json"),
        "versions": versions(),
        "latency": {"input_shape": list(shape), "device": device, "threads": torch.get_num_threads()},
        "table": table,
        "widths": chosen,
        "measured": result.measured,
        "notes": [*result.notes, *_notes(built)],
    }
    atomic_json(built.folder.path / "results.json", results)
    return results


def uniform_baseline(built: Built, macs: int) -> dict[str, int]:
    """Return the widths of the uniformly shrunk network that is compared with the searched one.

    Args:
        built: What the run works with.
        macs: The MACs that it may cost; where the budget is in memory or latency, the budget holds instead.
    """
    c = built.config
    if any(limit.kind in ("memory", "latency") for limit in built.budget.limits):
        return uniform_widths(built.net.space, built.budget)
    # A narrowest width that is no multiple of the divisor would be dropped.
    low = c.divisor if c.divisor > 1 else "0.01x"
    space = uniform_space(built.net.graph, 1, min_width=low, max_width=c.max_width, divisor=c.divisor, fixed=c.fixed)
    return uniform_widths(space, Budget((Limit("macs", macs, f"{macs} MACs"),)))


def proposed(built: Built, name: str) -> dict[str, int]:
    """Return the widths that a searcher proposes without judging any."""
    net = built.net
    data = make_loader(built.data.valid, JUDGED_TOGETHER, train=False)
    searcher = make_searcher(name, Resources(net, data), built.budget, np.random.default_rng(built.config.seed), {})
    assert isinstance(searcher, OneShotSearcher)
    return dict(searcher.propose())


def inherits(built: Built, widths: dict[str, int]) -> bool:
    """Whether a final training of these widths starts from the supernet's weights."""
    if built.config.init is not None:
        return built.config.init == "inherit"
    if has_trained_weights(built.config):
        return True
    # Where training has chosen the widths, its weights belong to them alone.
    chosen = built.net.chosen()
    return chosen is not None and widths == {name: len(units) for name, units in chosen.items()}


def final_network(
    built: Built, name: str, widths: dict[str, int], seed: int, teacher: nn.Module | None = None
) -> nn.Module:
    """Train one network of given widths with one seed, or go on, and return it.

    Args:
        built: What the run works with; its supernet is trained.
        name: The network's name in the table.
        widths: Group name -> width.
        seed: Seeds weights and order of the data.
        teacher: The dense network, if it teaches.
    """
    c = built.config
    if inherits(built, widths):
        slim = export(supernet_at(built, widths))
    else:
        slim = export(plain_model(c, built.data, seed), widths, graph=built.net.graph)
    how = built.recipe.final
    train_by(built, how, slim, built.folder.path / "final" / f"{name}-{seed}", seed=seed, teacher=teacher)
    recalibrate(slim, make_loader(built.data.train, how.batch_size, train=False))
    return slim


def _compared(
    built: Built, name: str, widths: dict[str, int], dense: nn.Module | None
) -> tuple[dict[str, Any], nn.Module]:
    """Return a row of the table, and the network of the first seed."""
    c = built.config
    given = dense is None and built.is_trained
    accuracies, networks = [], []
    for number in range(1 if given else c.seeds):
        if given:
            slim = plain_model(c, built.data, c.seed, trained=True)
        else:
            slim = final_network(built, name, widths, c.seed + number, dense if _teaches(built) else None)
        batches = make_loader(built.data.test, JUDGED_TOGETHER, train=False)
        accuracies.append(float(evaluate(slim, batches, device=c.device)["accuracy"]))
        networks.append(slim)
    n = len(accuracies)
    row = {
        "network": name,
        "macs": built.net.graph.macs(widths),
        "params": built.net.graph.params(widths),
        "accuracy": accuracies,
        "accuracy_mean": statistics.fmean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if n > 1 else None,
    }
    how = "as it was given" if given else f"over {n} training{'s' if n > 1 else ''}"
    built.say(f"{name}: accuracy {row['accuracy_mean']:.2%} {how}")
    return row, networks[0].cpu()


def _teaches(built: Built) -> bool:
    return built.is_trained if built.config.distill is None else built.config.distill


def _notes(built: Built) -> list[str]:
    """Say what is unequal in the comparison."""
    c, epochs = built.config, built.recipe.supernet.epochs
    if c.stages == 1 or not epochs or not inherits(built, built.net.graph.full):
        return []
    return [
        f"the searched network was also trained in {c.stages - 1} later stages of {epochs} epochs, the others were not"
    ]


def _name_slow_layers(
    table: list[dict[str, Any]], networks: dict[str, nn.Module], shape: tuple[int, ...], device: str
) -> None:
    """Note in a network's row the layers that keep it from being as fast as its MACs promise."""
    dense = table[0]
    slow = [r for r in table if is_slow(dense["latency_ms"], r["latency_ms"], dense["macs"], r["macs"])]
    if slow:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        usual = time_layers(networks["dense"].eval().to(device), x)
        for row in slow:
            layers = slow_layers(usual, time_layers(networks[row["network"]].eval().to(device), x))
            row["slow_layers"] = [layer.record() for layer in layers]
