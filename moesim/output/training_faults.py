"""What faults did to a training step: the `faults` key of `simulate --json`, and its table for a person."""

from __future__ import annotations

from typing import Any

from moesim.engine.training import TrainingRun
from moesim.output.console import console, shown
from moesim.output.training_page import FIGURES


def training_faults_json(run: TrainingRun) -> dict[str, Any] | None:
    """The faults, the same step without them, and the change by metric; None without faults."""
    if run.faulted is None:
        return None
    with_them, without = run.rates(run.faulted.step_s), run.rates(run.step.step_s)
    return {
        "list": [fault.model_dump(mode="json", exclude_none=True) for fault in run.faults],
        "without": without,
        "change": {name: with_them[name] / value - 1.0 for name, value in sorted(without.items())},
    }


def print_training_faults(result: dict[str, Any]) -> None:
    """The step with its faults beside the same step without them."""
    from rich.table import Table

    found = result["faults"]
    told = Table(title=f"With and without the faults ({len(found['list'])})", title_justify="left")
    told.add_column("figure")
    for name in ("with", "without", "change"):
        told.add_column(name, justify="right")
    for name, label, scale, unit in FIGURES:
        values = (result["metrics"][name], found["without"][name])
        told.add_row(label + unit, *(shown(value * scale, 4) for value in values), f"{found['change'][name]:+.1%}")
    console().print(told)
    console().print("The operations, the explanation and the timeline are of the step without its faults.")
