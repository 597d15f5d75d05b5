"""The last step of a run: train the networks that are compared, measure them, write the table and the slim network."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn

from widthkit.budget import Budget, Limit
from widthkit.export import export, save
from widthkit.files import atomic_json
from widthkit.graph.space import uniform_space
from widthkit.latency.slow_layers import is_slow, slow_layers, time_layers
from widthkit.latency.timing import forward_latency
from widthkit.run.build import Built
from widthkit.run.dense import input_shape, plain_model
from widthkit.run.steps import JUDGED_TOGETHER, supernet_at, train_by
from widthkit.search import SearchResult
from widthkit.search.uniform import uniform_widths
from widthkit.train import evaluate, make_loader, recalibrate
from widthkit.version import versions


def finish(built: Built, result: SearchResult) -> dict[str, Any]:
    """Train the dense, the uniform and the searched network, compare them, and write the searched one.

    Args:
        built: What the run works with; its supernet is trained.
        result: What the search found.

    Returns:
        What ``results.json`` holds.
    """
    chosen = {
        "dense": built.net.graph.full,
        "uniform": uniform_baseline(built, result.macs),
        "searched": result.widths,
    }
    table, networks = [], {}
    for name, widths in chosen.items():
        row, networks[name] = _compared(built, name, widths)
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
        "notes": result.notes,
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


def final_network(built: Built, name: str, widths: dict[str, int], seed: int) -> nn.Module:
    """Train one network of given widths with one seed, or go on, and return it.

    Args:
        built: What the run works with; its supernet is trained.
        name: The network's name in the table.
        widths: Group name -> width.
        seed: Seeds weights and order of the data.
    """
    c = built.config
    if c.init == "inherit":
        slim = export(supernet_at(built, widths))
    else:
        slim = export(plain_model(c, built.data, seed), widths, graph=built.net.graph)
    how = built.recipe.final
    train_by(built, how, slim, built.folder.path / "final" / f"{name}-{seed}", seed=seed)
    recalibrate(slim, make_loader(built.data.train, how.batch_size, train=False))
    return slim


def _compared(built: Built, name: str, widths: dict[str, int]) -> tuple[dict[str, Any], nn.Module]:
    """Return a row of the table, and the network of the first seed."""
    accuracies, networks = [], []
    for number in range(built.config.seeds):
        slim = final_network(built, name, widths, built.config.seed + number)
        batches = make_loader(built.data.test, JUDGED_TOGETHER, train=False)
        accuracies.append(float(evaluate(slim, batches, device=built.config.device)["accuracy"]))
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
    built.say(f"{name}: accuracy {row['accuracy_mean']:.2%} over {n} training{'s' if n > 1 else ''}")
    return row, networks[0].cpu()


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
