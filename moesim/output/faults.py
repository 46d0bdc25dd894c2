"""What faults did to a run: the `faults` key of `simulate --json`, and its table for a person."""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.engine.simulate import Simulation
from moesim.output.console import console, shown
from moesim.output.metrics import flatten, serving_metrics

_MANIFOLD = 4.0  # from five times on
FIGURES = (
    ("output_tokens_per_s_per_gpu", "output tokens/s/GPU", 1.0),
    ("ttft_s.p50", "TTFT p50 (ms)", 1e3),
    ("ttft_s.p99", "TTFT p99 (ms)", 1e3),
    ("tpot_s.p50", "TPOT p50 (ms)", 1e3),
    ("tpot_s.p99", "TPOT p99 (ms)", 1e3),
    ("e2e_s.p99", "E2E p99 (ms)", 1e3),
)


def faults_json(simulation: Simulation) -> dict[str, Any] | None:
    """The faults, what they lost, and the same run without them; None where the scenario has none.

    change: dotted metric -> with faults over without, less 1 (None where the run without has 0).
    """
    if simulation.without_faults is None:
        return None
    gpus = simulation.deployment.ground.cluster.gpus
    healthy = serving_metrics(simulation.without_faults, gpus)
    return {
        "list": [fault.model_dump(mode="json", exclude_none=True) for fault in simulation.deployment.scenario.faults],
        "requests_failed": int((~np.isfinite(simulation.served.finish_s)).sum()),
        "without": healthy,
        "change": changes(serving_metrics(simulation.served, gpus), healthy),
    }


def changes(metrics: dict[str, Any], others: dict[str, Any]) -> dict[str, float | None]:
    """Dotted metric -> one run's over the other's, less 1; None where the other has 0."""
    found, without = flatten(metrics), flatten(others)
    return {name: found[name] / value - 1.0 if value > 0 else None for name, value in sorted(without.items())}


def print_faults(result: dict[str, Any]) -> None:
    """The run with its faults beside the same run without them."""
    from rich.table import Table

    found, with_faults = result["faults"], flatten(result["metrics"])
    without = flatten(found["without"])
    told = Table(title=f"With and without the faults ({len(found['list'])})", title_justify="left")
    told.add_column("figure")
    for name in ("with", "without", "change"):
        told.add_column(name, justify="right")
    for metric, label, scale in FIGURES:
        change = found["change"][metric]
        told.add_row(
            label,
            shown(with_faults[metric] * scale, 4),
            shown(without[metric] * scale, 4),
            change_of(change),
        )
    told.add_row(
        "requests completed", f"{with_faults['requests_completed']:.0f}", f"{without['requests_completed']:.0f}", ""
    )
    told.add_row("requests failed", str(found["requests_failed"]), "0", "")
    console().print(told)


def change_of(change: float | None) -> str:
    """`+12.0 %`, or `x 41` where a percentage says little."""
    if change is None:
        return ""
    return f"{change:+.1%}" if change < _MANIFOLD else f"x {1.0 + change:.3g}"
