"""Measure how well the latency of unseen widths is predicted, and how long a prediction takes."""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from widthkit.bench.files import write
from widthkit.export import export
from widthkit.graph import ChannelGraph, FloatArray, IntArray
from widthkit.latency import Conditions, LatencyModel
from widthkit.latency.model import N_NETWORKS, random_widths, spread_widths
from widthkit.latency.timing import interleaved
from widthkit.modules.models import create_model
from widthkit.trace import trace

DEFAULT = ["torchvision/resnet18", "torchvision/mobilenet_v2", "timm/efficientnet_b0"]


def run(models: list[str], size: int, conditions: Conditions, networks: int, out: Path | None, seed: int = 1) -> None:
    """Predict, then measure random sub-networks that the correction has not seen, and print the errors.

    Args:
        models: Names of models.
        size: Side length of the images.
        conditions: Device, batch size, type and memory format.
        networks: Sub-networks per model.
        out: JSON file.
        seed: Seeds the draw.
    """
    console = Console(soft_wrap=True)
    rows = []
    for name in models:
        row = measure(name, size, conditions, networks, seed)
        rows.append(row)
        console.print(
            f"{name} {size}x{size}: median error {row['median_error']:.1%}, largest {row['largest_error']:.1%} "
            f"(from MACs alone {row['macs_only_median_error']:.1%}), rank correlation {row['kendall_tau']:.2f}; "
            f"{networks} networks of {min(row['measured_ms']):.1f} to {max(row['measured_ms']):.1f} ms; "
            f"operators {row['tables_s']:.0f} s, whole networks {row['networks_s']:.0f} s, "
            f"one prediction {row['predict_one_ms']:.2f} ms, 1000 at once {row['predict_1000_ms']:.0f} ms",
            highlight=False,
        )
    write(out, "predict", rows, conditions.device or "cpu", conditions=str(conditions), image_size=size, seed=seed)


def measure(name: str, size: int, conditions: Conditions, networks: int, seed: int) -> dict[str, Any]:
    """Measure one model: tables first (if the cache lacks them), then whole networks in turns.

    The networks of the correction and the unseen ones take turns, so that a change of the machine's speed does not look
    like an error of the prediction.
    """
    model = create_model(name).eval()
    graph = trace(model, (1, 3, size, size))
    latency = LatencyModel(graph, conditions)
    start = time.perf_counter()
    latency.sums(graph.vector())
    tables = time.perf_counter()
    correcting, rng = spread_widths(graph, N_NETWORKS), np.random.default_rng(seed)
    drawn = random_widths(graph, rng.uniform(0.15, 0.95, networks).tolist(), rng)
    built = {str(i): export(model, widths, graph=graph) for i, widths in enumerate([*correcting, *drawn])}
    times = list(latency.measure_ms(built).values())
    latency.correct(correcting, times[: len(correcting)])
    measured = times[len(correcting) :]
    predicted = latency.predict_ms(drawn)
    end = time.perf_counter()
    return {
        "model": name,
        **_errors(np.asarray(predicted), np.array(measured)),
        "predicted_ms": np.asarray(predicted).tolist(),
        "measured_ms": [float(ms) for ms in measured],
        "macs": [graph.macs(widths) for widths in drawn],
        "macs_only_median_error": _macs_only(latency, graph, drawn, np.array(measured)),
        "correction_error": latency.correction.error,
        "copied": latency.copied,
        "tables_s": tables - start,
        "networks_s": end - tables,
        **_speed(latency, graph.vector(drawn)),
        "on": latency.device,
        "threads": torch.get_num_threads(),
    }


def _errors(predicted: FloatArray, measured: FloatArray) -> dict[str, float]:
    from scipy.stats import kendalltau

    errors = np.abs(predicted / measured - 1)
    return {
        "median_error": float(np.median(errors)),
        "largest_error": float(errors.max()),
        "kendall_tau": float(kendalltau(predicted, measured).statistic),
    }


def _macs_only(latency: LatencyModel, graph: ChannelGraph, drawn: list[dict[str, int]], measured: FloatArray) -> float:
    """Return the median error without tables: of a line through MACs, fitted on the networks of the correction."""
    rows = latency.cache.networks(latency.key)
    seconds = np.array([row["seconds"] for row in rows])
    x, y = graph.macs([row["widths"] for row in rows]) / seconds, 1 / seconds
    line, *_ = np.linalg.lstsq(np.stack([y, x], axis=1), np.ones(len(rows)), rcond=None)
    guessed = 1000 * (line[0] + line[1] * graph.macs(drawn))
    return float(np.median(np.abs(guessed / measured - 1)))


def _speed(latency: LatencyModel, vectors: IntArray) -> dict[str, float]:
    many = np.resize(vectors, (1000, vectors.shape[1]))
    found = {}
    for key, widths in (("predict_one_ms", vectors[0]), ("predict_1000_ms", many)):
        seconds = interleaved({key: partial(latency.predict_ms, widths)}, repeats=5, warmup=0)[key]
        found[key] = 1000 * statistics.median(seconds)
    return found
