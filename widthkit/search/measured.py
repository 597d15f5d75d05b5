"""Compare predicted with measured memory and latency of the found network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from widthkit.budget import Budget, Limit, show_count
from widthkit.graph.plan import apply_plan
from widthkit.latency.measure import example_inputs, placed
from widthkit.supernet import Supernet
from widthkit.trace.lifetimes import record_lifetimes

_DRIFT = 0.1
"""How far the model itself may be from its prediction before people are told."""


def network_of(net: Supernet, widths: Mapping[str, int]) -> nn.Module:
    """Return the dense network of given widths, with the supernet's weights."""
    return apply_plan(net.whole(), net.plan(net.units(widths)))


def measure_result(net: Supernet, budget: Budget, widths: Mapping[str, int]) -> list[dict[str, Any]]:
    """Measure the found network for every memory and latency bound, beside the model as given.

    Returns:
        One row per bound: kind, text, bound, predicted, measured, and for latency the model's own, in turns.
    """
    return [_row(net, limit, widths) for limit in budget.limits if limit.kind in ("memory", "latency")]


def _row(net: Supernet, limit: Limit, widths: Mapping[str, int]) -> dict[str, Any]:
    row = {"kind": limit.kind, "budget": limit.text, "bound": limit.value}
    row["predicted"] = limit.cost(net.graph, dict(widths))
    if limit.kind == "memory":
        return {**row, "measured": peak_memory(network_of(net, widths), limit, net)}
    assert limit.latency is not None
    networks = {"found": network_of(net, widths), "dense": network_of(net, net.graph.full)}
    measured = limit.latency.measure_ms(networks)
    more = {
        "dense_predicted": limit.latency.predict_ms(),
        "device": limit.latency.device,
        "correction_error": limit.latency.correction.error,
    }
    return {**row, "measured": measured["found"], "dense": measured["dense"], **more}


def peak_memory(network: nn.Module, limit: Limit, net: Supernet) -> int:
    """Run a network and return the bytes of its weights and of the largest set of blocks alive at once."""
    program = net.graph.program
    assert program is not None
    lifetimes = record_lifetimes(placed(network, limit.conditions), example_inputs(program, limit.conditions))
    end = len(lifetimes.names)
    alive = [0] * (end + 1)
    for block in lifetimes.blocks:
        alive[block.first_call] += block.n_bytes
        alive[end if block.end_call is None else block.end_call] -= block.n_bytes
    peak = now = 0
    for change in alive[:end]:
        now += change
        peak = max(peak, now)
    tensors = {id(t): t for t in (*network.parameters(), *network.buffers())}
    return peak + sum(t.numel() * t.element_size() for t in tensors.values())


def remarks(rows: list[dict[str, Any]], macs: int, full_macs: int) -> list[str]:
    """Say in words what people should know: bounds that the measurement misses, and MACs that bought no speed."""
    found = []
    for row in rows:
        show = Limit(row["kind"], row["bound"], row["budget"]).show
        over = row["measured"] / row["bound"] - 1
        if over > 0:
            found.append(
                f"measured, the network takes {show(row['measured'])}, {over:.1%} above the budget {row['budget']} "
                f"(predicted {show(row['predicted'])}); search again with a smaller one"
            )
        drift = row["dense"] / row["dense_predicted"] - 1 if "dense_predicted" in row else 0.0
        if abs(drift) > _DRIFT:
            found.append(
                f"under {row['budget']} the model itself takes {show(row['dense'])} now and "
                f"{show(row['dense_predicted'])} by the tables: the device is busy, or runs at another clock than "
                "when they were measured"
            )
        if row["kind"] == "latency" and macs < full_macs and row["measured"] >= row["dense"]:
            found.append(
                f"the network has {show_count(macs)} MACs instead of {show_count(full_macs)} but is not faster under "
                f"{row['budget']}: {show(row['measured'])}, the model itself {show(row['dense'])}"
            )
    return found


def describe_rows(rows: list[dict[str, Any]]) -> list[str]:
    """One phrase per bound: predicted against measured."""
    said = []
    for row in rows:
        show = Limit(row["kind"], row["bound"], row["budget"]).show
        faster = f", {row['dense'] / row['measured']:.2f}x as fast as the model" if row["kind"] == "latency" else ""
        said.append(
            f"{row['kind']} {show(row['measured'])} measured, {show(row['predicted'])} predicted "
            f"(budget {row['budget']}{faster})"
        )
    return said
