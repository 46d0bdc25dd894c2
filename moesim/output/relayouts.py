"""What new placements cost and brought: the `relayouts` key of `simulate --json`, and its table for a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moesim.engine.relayout_decisions import Relayout
from moesim.engine.relayout_runs import Relayouts
from moesim.engine.simulate import Simulation
from moesim.output.console import console, shown
from moesim.output.faults import FIGURES, change_of, changes
from moesim.output.metrics import serving_metrics
from moesim.output.timeline import Slice


def relayouts_json(simulation: Simulation) -> dict[str, Any] | None:
    """The new placements of a run beside the same run without them; None where the scenario asks for none.

    count: placements moved to; decisions: times it was solved, every interval_steps. moved_*: over all of them.
    balance, step_gain_s: means over the placements moved to (`next_*`: over those with a next window).
    break_even_steps: of a mean one; None where a step gains nothing. bytes_by_link: of the whole run. change: dotted
    metric -> with over without, less 1.
    """
    told = simulation.relayouts
    if told is None:
        return None
    cluster = simulation.deployment.ground.cluster
    moved = [event for event in told.events if event.placement is not None]
    judged = [event for event in moved if event.next_after is not None]
    lost_s, gain_s = _mean(moved, "lost_s"), _mean(moved, "gain_s")
    without = serving_metrics(told.without, cluster.gpus)
    return {
        "count": len(moved),
        "decisions": len(told.events),
        "interval_steps": told.interval_steps,
        "moved_experts": sum(event.moved_experts for event in moved),
        "moved_bytes": sum(event.moved_bytes for event in moved),
        "bytes_by_level": {
            level: sum(event.bytes_by_level[level] for event in moved) for level in ("inside", "between")
        },
        "bytes_by_link": _by_link(simulation, moved),
        "pause_s_total": sum(seconds for _, _, seconds in told.pauses),
        "delay_s_total": sum(event.delay_s for event in told.events),
        "balance": {
            "before": _mean(moved, "before"),
            "after": _mean(moved, "after"),
            "next_before": _mean(judged, "next_before"),
            "next_after": _mean(judged, "next_after"),
        },
        "step_gain_s": gain_s,
        "break_even_steps": lost_s / gain_s if lost_s is not None and gain_s is not None and gain_s > 0 else None,
        "tag": moved[0].tag if moved else None,
        "list": [_one(event) for event in told.events],
        "without": without,
        "change": changes(serving_metrics(simulation.served, cluster.gpus), without),
    }


def pause_slices(told: Relayouts | None) -> list[Slice]:
    """The times at which an instance stood still for a new placement, on the track of its steps."""
    pauses = () if told is None else told.pauses
    return [("steps", f"instance {instance}", "new placement", start, seconds) for instance, start, seconds in pauses]


def print_relayouts(result: dict[str, Any]) -> None:
    """The run with its new placements beside the same run without them."""
    from rich.table import Table

    from moesim.output.metrics import flatten

    found, with_them = result["relayouts"], flatten(result["metrics"])
    without = flatten(found["without"])
    told = Table(title=f"With and without new placements ({found['count']})", title_justify="left")
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
    steps = found["break_even_steps"]
    back = "never pays back" if steps is None else f"pays back after {shown(steps, 3)} steps"
    if not found["decisions"]:
        console().print(f"Nothing was solved again: no instance took {found['interval_steps']} steps.")
    if found["count"]:
        console().print(
            f"{found['moved_experts']} experts ({shown(found['moved_bytes'] / 1e9, 4)} GB) moved, "
            f"{shown(found['pause_s_total'], 3)} s stood still; a mean one {back}",
            soft_wrap=True,
        )


def _one(event: Relayout) -> dict[str, Any]:
    """A decision, ready for JSON."""
    left_out = ("placement", "pair_bytes")
    plain = {name: value for name, value in vars(event).items() if name not in left_out}
    return {**plain, "moved": event.placement is not None, "break_even_steps": event.break_even_steps}


def _by_link(simulation: Simulation, moved: Sequence[Relayout]) -> list[dict[str, Any]]:
    network = simulation.deployment.setup.network
    if not moved or network is None:
        return []
    topology = network.exchange("flat").topology
    edges, loads = topology.link_loads(np.sum([event.pair_bytes for event in moved], axis=0))
    return [
        {"from": one, "to": other, "bytes": load}
        for (one, other), load in zip(edges, loads.tolist(), strict=True)
        if load > 0
    ]


def _mean(events: Sequence[Relayout], name: str) -> float | None:
    return float(np.mean([getattr(event, name) for event in events])) if events else None
