"""What laying experts out anew cost and brought: the `relayouts` key of `simulate --json`, and its table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moesim.engine.relayout_decisions import Relayout
from moesim.engine.simulate import Simulation
from moesim.output.console import console, shown
from moesim.output.faults import FIGURES, change_of, changes
from moesim.output.metrics import flatten, serving_metrics


def relayouts_json(simulation: Simulation) -> dict[str, Any] | None:
    """The re-layouts of a run beside the same run without them; None where the scenario asks for none.

    count: placements moved to; skipped: decisions that left it, one every interval_steps. moved_*: over all of them.
    balance_*, step_gain_s: means over the placements moved to (`next_*`: over those with a next window).
    break_even_steps: of a mean one; None where a step gains nothing. bytes_by_link: of the whole run. change: dotted
    metric -> with re-layouts over without, less 1.
    """
    spec = simulation.deployment.scenario.placement.rebalance
    if simulation.without_relayouts is None or spec is None:
        return None
    gpus, every = simulation.deployment.ground.cluster.gpus, simulation.relayouts
    moved = [event for event in every if event.placement is not None]
    judged = [event for event in moved if event.next_balance_after is not None]
    lost_s, gain_s = _mean(moved, "lost_s"), _mean(moved, "gain_s")
    without = serving_metrics(simulation.without_relayouts, gpus)
    return {
        "count": len(moved),
        "skipped": len(every) - len(moved),
        "interval_steps": spec.interval_steps,
        "moved_experts": sum(event.moved_experts for event in moved),
        "moved_bytes": {
            "nvlink": sum(event.bytes_by_level["inside"] for event in moved),
            "nic": sum(event.bytes_by_level["between"] for event in moved),
            "copied": sum(event.copied_bytes for event in moved),
        },
        "bytes_by_link": _by_link(simulation, moved),
        "pause_s_total": sum(seconds for _, _, seconds in simulation.pauses),
        "delay_s_total": sum(event.delay_s for event in every),
        "balance_before": _mean(moved, "balance_before"),
        "balance_after": _mean(moved, "balance_after"),
        "next_balance_before": _mean(judged, "next_balance_before"),
        "next_balance_after": _mean(judged, "next_balance_after"),
        "step_gain_s": gain_s,
        "break_even_steps": lost_s / gain_s if lost_s is not None and gain_s is not None and gain_s > 0 else None,
        "tag": moved[0].tag if moved else None,
        "list": [_one(event) for event in every],
        "without": without,
        "change": changes(serving_metrics(simulation.served, gpus), without),
    }


def print_relayouts(result: dict[str, Any]) -> None:
    """The run with its re-layouts beside the same run without them."""
    from rich.table import Table

    found, with_them = result["relayouts"], flatten(result["metrics"])
    without = flatten(found["without"])
    told = Table(title=f"With and without re-layouts ({found['count']})", title_justify="left")
    told.add_column("figure")
    for name in ("with", "without", "change"):
        told.add_column(name, justify="right")
    for metric, label, scale in FIGURES:
        told.add_row(
            label,
            shown(with_them[metric] * scale, 4),
            shown(without[metric] * scale, 4),
            change_of(found["change"][metric]),
        )
    console().print(told)
    if not found["list"]:
        console().print(f"Nothing was solved again: no instance took {found['interval_steps']} steps.")
    elif not found["count"]:
        console().print(f"No re-layout moved anything ({found['skipped']} skipped).")
    else:
        steps, moved = found["break_even_steps"], found["moved_bytes"]
        back = "never pays back" if steps is None else f"pays back after {shown(steps, 3)} steps"
        size = (moved["nvlink"] + moved["nic"]) / 1e9
        console().print(
            f"{found['moved_experts']} experts ({shown(size, 4)} GB) moved, {shown(found['pause_s_total'], 3)} s stood "
            f"still; a mean one {back}",
            soft_wrap=True,
        )


def _one(event: Relayout) -> dict[str, Any]:
    """A decision, ready for JSON; one that was skipped has no step times to tell."""
    left_out = ("placement", "pair_bytes")
    plain = {name: value for name, value in vars(event).items() if name not in left_out}
    skipped = event.placement is None
    if skipped:
        plain |= {"step_before_s": None, "step_after_s": None}
    return {**plain, "skipped": skipped, "break_even_steps": event.break_even_steps}


def _by_link(simulation: Simulation, moved: Sequence[Relayout]) -> list[dict[str, Any]]:
    network = simulation.deployment.setup.network
    if not moved or network is None:
        return []
    topology = network.paths("flat").topology
    edges, loads = topology.link_loads(np.sum([event.pair_bytes for event in moved], axis=0))
    return [
        {"from": one, "to": other, "bytes": load}
        for (one, other), load in zip(edges, loads.tolist(), strict=True)
        if load > 0
    ]


def _mean(events: Sequence[Relayout], name: str) -> float | None:
    return float(np.mean([getattr(event, name) for event in events])) if events else None
