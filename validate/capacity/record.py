"""The record of `validate capacity`, and what it says to a person."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from validate.hardware.record import hardware, versions

if TYPE_CHECKING:
    from validate.capacity.run import CapacityJob

SHOWN = 20  # differences that are written out
PAIRS = ("dropped", "moved", "tokens_without_expert", "rows")


def record_of(job: CapacityJob, outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Totals over all cases, what differs, and every case."""
    wrong = [f"{one['name']}: {line}" for one in outcomes for line in one["differences"]]
    counts = [one["counts"] for one in outcomes]
    exact = [one for one, told in zip(outcomes, counts, strict=True) if told["claimed_exact"]]
    assumed = [one for one in outcomes if "backup" not in one["name"]]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(torch.device("cpu")),
        "versions": versions(),
        "backend": job.backend,
        "ranks": len(job.tokens),
        "tokens": list(job.tokens),
        "seed": job.seed,
        "cases": len(outcomes),
        "picks": sum(one["picks"] for one in outcomes),
        **{name: {side: sum(one[name][side] for one in outcomes) for side in ("simulated", "executed")}
           for name in PAIRS},
        "cases_with_drops": sum(one["dropped"]["executed"] > 0 for one in outcomes),
        "cases_that_differ": sum(bool(one["differences"]) for one in outcomes),
        "differences": wrong[:SHOWN],
        "largest_weight_error": max(one["largest_weight_error"] for one in outcomes),
        "cases_whose_doubles_differ": sum(one["places_in_floats_differ"] for one in outcomes),
        "counts": {
            "claimed_exact": len(exact),
            "held": sum(one["holds"] for one in counts),
            "failed": [one["name"] for one, told in zip(outcomes, counts, strict=True) if not told["holds"]][:SHOWN],
            "expected_without_backup": sum(one["counts"]["dropped_of_all_ranks"] for one in assumed),
            "dropped_without_backup": sum(one["dropped"]["executed"] for one in assumed),
        },
        "outcomes": list(outcomes),
    }  # fmt: skip


def holds(record: dict[str, Any]) -> bool:
    """Whether simulation and execution agree in every case, and counts in what they claim."""
    return not record["cases_that_differ"] and record["counts"]["held"] == record["cases"]


def table(record: dict[str, Any]) -> str:
    """The record for a person."""
    sides = ("simulated", "executed")
    lines = [
        f"{record['cases']} cases on {record['ranks']} {record['backend']} ranks of {record['tokens']} tokens: "
        f"{record['picks']} picks, drops in {record['cases_with_drops']} cases",
        f"{'':34}{sides[0]:>12}{sides[1]:>12}",
    ]
    names = ("picks dropped", "picks moved to another expert", "tokens left without an expert", "rows computed")
    for name, label in zip(PAIRS, names, strict=True):
        lines.append(f"{label:34}{record[name][sides[0]]:>12}{record[name][sides[1]]:>12}")
    counts = record["counts"]
    lines += [
        f"token for token: {record['cases'] - record['cases_that_differ']} of {record['cases']} cases agree; weights "
        f"found in the outputs within {record['largest_weight_error']:.1g}",
        f"from counts alone: {counts['held']} of {record['cases']} cases hold what they claim "
        f"({counts['claimed_exact']} of them exact by expert)",
        f"from counts over all ranks: {counts['expected_without_backup']:.0f} drops expected without backups, "
        f"{counts['dropped_without_backup']} executed",
        f"an engine's doubles would give another capacity in {record['cases_whose_doubles_differ']} cases",
        *record["differences"],
        *(f"counts: {name}" for name in counts["failed"]),
    ]
    return "\n".join(lines)
