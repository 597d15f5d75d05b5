"""Turn records into the table: rank correlations, and the noise of training to compare them with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.learn.records import read_json, supernet_records
from widthkit.bench.files import write
from widthkit.files import atomic_write


def kendall(a: npt.ArrayLike, b: npt.ArrayLike) -> float | None:
    """Kendall's tau-b of two rankings; ``None`` where one of them is constant or there are fewer than two values.

    >>> round(kendall([1, 2, 3], [1, 3, 2]), 3)
    0.333
    """
    from scipy.stats import kendalltau

    value = float(kendalltau(np.asarray(a), np.asarray(b)).statistic) if np.size(a) > 1 else math.nan
    return None if math.isnan(value) else value


def summarise(folder: Path) -> dict[str, Any] | None:
    """Turn one model's records into its part of the table; ``None`` if fewer than two widths were trained alone."""
    trained = _trained(folder)
    if len(trained) < 2:
        return None
    setup = read_json(folder / "setup.json")
    numbers = sorted(trained)
    runs = np.array([[run["accuracy"] for run in trained[n]] for n in numbers])
    equal = np.array([trained[n][0]["equal_macs"] for n in numbers])
    truth = runs.mean(axis=1)

    def correlate(values: Sequence[float], target: Any = truth) -> dict[str, float | None]:
        x, y = np.asarray(values), np.asarray(target)
        return {"tau": kendall(x, y), "tau_equal_macs": kendall(x[equal], y[equal])}

    baselines = [{"ranking": name, **correlate([trained[n][0][name] for n in numbers])} for name in ("macs", "params")]
    if runs.shape[1] > 1:
        # One training against the other: even a perfect predictor could hardly rank a single training better.
        baselines.insert(0, {"ranking": "a second training", **correlate(runs[:, 1].tolist(), runs[:, 0])})
    seconds = [run["seconds"] for n in numbers for run in trained[n]]
    return {
        "model": setup["model"],
        "setup": setup,
        "complete": len(numbers) == setup["n_widths"],
        "widths_trained": len(numbers),
        "equal_macs_widths": int(equal.sum()),
        "accuracy_min": float(truth.min()),
        "accuracy_max": float(truth.max()),
        "seed_noise": _seed_noise(runs),
        "dense_seconds": sum(seconds),
        "baselines": baselines,
        "strategies": _strategies(folder, numbers, correlate),
    }


def _trained(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Return the trainings of each width vector by its number; vectors that lack a seed are left out."""
    seeds = read_json(folder / "setup.json")["seeds"]
    found: dict[int, list[dict[str, Any]]] = {}
    for number in range(read_json(folder / "setup.json")["n_widths"]):
        files = [folder / f"dense-{number:02d}-{seed}.json" for seed in range(seeds)]
        if all(file.exists() for file in files):
            found[number] = [read_json(file) for file in files]
    return found


def _seed_noise(runs: Any) -> float | None:
    """Standard deviation of one training's accuracy, from the differences between seeds of the same widths."""
    return float(np.sqrt(runs.var(axis=1, ddof=1).mean())) if runs.shape[1] > 1 else None


def _strategies(folder: Path, numbers: list[int], correlate: Any) -> list[dict[str, Any]]:
    cost = read_json(folder / "cost.json")["rows"] if (folder / "cost.json").exists() else []
    rows = {row["strategy"]: dict(row) for row in cost}
    for record in supernet_records(folder):
        row = rows.setdefault(record["strategy"], {"strategy": record["strategy"]})
        # A loss that is not finite is null in a record; it counts as the worst score.
        scores = [-math.inf if record["score"][n] is None else record["score"][n] for n in numbers]
        row.update(correlate(scores), repr=record["repr"], train_seconds=record["seconds"])
        accuracies = [record["accuracy"][n] for n in numbers]
        row["tau_of_accuracy"] = correlate(accuracies)["tau"]
    return list(rows.values())


def write_tables(folder: Path, out: Path) -> None:
    """Write ``learn.json`` and ``learn.md`` to ``out``, from all records in the folders of ``folder``."""
    folders = sorted(path.parent for path in folder.glob("*/setup.json"))
    tables = [table for table in map(summarise, folders) if table is not None]
    write(out / "learn.json", "learn", tables)
    atomic_write(out / "learn.md", "\n".join(map(markdown, tables)).encode())


def markdown(table: dict[str, Any]) -> str:
    """Write one model's part as Markdown."""
    s = table["setup"]
    noise = "" if table["seed_noise"] is None else f", standard deviation between seeds {table['seed_noise']:.2%}"
    lines = [
        f"### {table['model']}",
        "",
        f"{table['widths_trained']} of {s['n_widths']} width vectors, {table['equal_macs_widths']} of them at nearly "
        f"equal MACs; each trained alone {s['seeds']} times for {s['epochs']} epochs of {s['train_images']} images, "
        f"supernets for {s['supernet_epochs']}; batch {s['batch_size']}. "
        f"Accuracy {table['accuracy_min']:.1%} to {table['accuracy_max']:.1%}{noise}.",
        "",
        "| strategy | forwards | backwards | ms per step | x dense | peak MB | tau | tau at equal MACs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table["strategies"]:
        peak = None if "peak_bytes" not in row else row["peak_bytes"] / 1e6
        cells = [
            row["strategy"],
            *(str(row.get(name, "-")) for name in ("forwards", "backwards")),
            _number(row.get("step_ms"), 1),
            _number(row.get("times_dense"), 2),
            _number(peak, 1),
            _number(row.get("tau"), 3),
            _number(row.get("tau_equal_macs"), 3),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for row in table["baselines"]:
        name = row["ranking"] if " " in row["ranking"] else f"{row['ranking']} alone"
        cells = [name, *"-----", "-", _number(row["tau"], 3), _number(row["tau_equal_macs"], 3)]
        lines.append(f"| {' | '.join(cells[:6] + cells[-2:])} |")
    return "\n".join([*lines, ""])


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
