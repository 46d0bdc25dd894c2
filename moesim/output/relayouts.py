"""What laying experts out anew did to a run: the `relayouts` key of `simulate --json`, and its lines for a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moesim.engine.relayout import Relayout
from moesim.engine.simulate import Simulation
from moesim.output.console import console
from moesim.output.metrics import flatten, serving_metrics
from moesim.units import human_bytes, human_seconds


def relayouts_json(simulation: Simulation) -> dict[str, Any] | None:
    """Every re-layout of the run as best known, their sums, and the same run without; None where none was asked for.

    change: dotted metric -> with re-layouts over without, less 1 (None where the run without has 0).
    """
    if simulation.without_relayouts is None:
        return None
    gpus = simulation.deployment.ground.cluster.gpus
    plain = serving_metrics(simulation.without_relayouts, gpus)
    with_them, without = flatten(serving_metrics(simulation.served, gpus)), flatten(plain)
    moved = [one for one in simulation.relayouts if one.moves is not None]
    return {
        "count": len(moved),
        "skipped": len(simulation.relayouts) - len(moved),
        "moved_experts": sum(one.moves.moved for one in moved if one.moves is not None),
        "moved_bytes": {
            "nvlink": _bytes(moved, "received_near"),
            "nic": _bytes(moved, "received_far"),
            "copied": _bytes(moved, "copied"),
        },
        "pause_s_total": float(sum(one.pause_s for one in moved)),
        "balance_before": _mean([one.balance_before for one in moved]),
        "balance_after": _mean([one.balance_after for one in moved]),
        "list": [_one(one) for one in simulation.relayouts],
        "without": plain,
        "change": {
            name: with_them[name] / value - 1.0 if value > 0 else None for name, value in sorted(without.items())
        },
        "tag": "assumed",
    }


def _bytes(moved: Sequence[Relayout], kind: str) -> float:
    return float(sum(getattr(one.moves, kind).sum() * one.expert_bytes for one in moved))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _one(one: Relayout) -> dict[str, Any]:
    return {
        "instance": one.instance,
        "at_s": one.at_s,
        "skipped": one.moves is None,
        "pause_s": one.pause_s,
        "moved_experts": 0 if one.moves is None else one.moves.moved,
        "balance_before": one.balance_before,
        "balance_after": one.balance_after,
        "step_before_s": one.step_before_s,
        "step_after_s": one.step_after_s,
        "break_even_steps": one.break_even_steps,
    }


def print_relayouts(result: dict[str, Any]) -> None:
    """A few lines: what moved, what it cost, what it brought."""
    out, found = console(), result["relayouts"]
    if not found["count"]:
        out.print(f"No re-layout moved anything ({found['skipped']} skipped).")
        return
    moved = found["moved_bytes"]
    change = found["change"]
    paid = [one["break_even_steps"] for one in found["list"] if not one["skipped"]]
    known = [steps for steps in paid if steps is not None]
    back = f"median {np.median(known):,.0f} steps" if known else "never"
    out.print(
        f"{found['count']} re-layouts ({found['skipped']} skipped) moved {found['moved_experts']:,} experts, "
        f"{human_bytes(moved['nvlink'])} over NVLink and {human_bytes(moved['nic'])} between nodes, in "
        f"{human_seconds(found['pause_s_total'])} of pauses; rank max/mean {found['balance_before']:.3f} before, "
        f"{found['balance_after']:.3f} after; paid back by its own step: {back}."
    )
    told = [
        f"{label} {change[name]:+.1%}"
        for name, label in (
            ("output_tokens_per_s_per_gpu", "output tokens/s/GPU"),
            ("tpot_s.p50", "TPOT p50"),
            ("tpot_s.p99", "TPOT p99"),
            ("ttft_s.p99", "TTFT p99"),
        )
        if change[name] is not None
    ]
    out.print(f"Against the first placement throughout: {', '.join(told)}.")
