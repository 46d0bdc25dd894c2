"""Which profiles priced a run, and in words what its intervals rest on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moesim.cost.estimate import CostModel, TellsProfiles

FEW_MEASURED = 0.1
"""Share of a run's time outside the measurements from which its intervals are said to be no measured ones."""


def priced_json(costs: CostModel, source: str, outside_share: float) -> dict[str, Any]:
    """The profiles of a run, each with `answered`, and notes, a sentence each.

    source: the scenario's. outside_share: of the run's time, outside what the profiles hold.
    """
    profiles, notes = costs.profiles_told() if isinstance(costs, TellsProfiles) else ((), ())
    said = interval_note(source, outside_share)
    return {
        "source": source,
        "profiles": [dataclasses.asdict(one) for one in profiles],
        "outside_share": outside_share,
        "notes": [*notes, *([said] if said else [])],
    }


def interval_note(source: str, outside_share: float) -> str:
    """What to know of a run's intervals; empty where measurements stand behind them."""
    if source == "roofline":
        return (
            "Every price is a formula on datasheet peaks (cost.source: roofline): kernels and exchanges by what they "
            "reach on other GPUs; no measurement of this GPU backs the intervals."
        )
    if outside_share < FEW_MEASURED:
        return ""
    return (
        f"{outside_share:.0%} of the time lies outside what the profiles measured: no measurement backs the intervals "
        "there, whose widths are those of the nearest tables or assumed. `moesim doctor` names the kernels."
    )


def priced_lines(result: Mapping[str, Any]) -> list[str]:
    """The profiles that answered, and the notes, for a person."""
    priced = result["priced_by"]
    answered = [_words(one) for one in priced["profiles"] if one["answered"]]
    return [
        *([f"Priced by {'; '.join(answered)}."] if answered else []),
        *(f"Note: {note}" for note in priced["notes"]),
    ]


def _words(one: Mapping[str, Any]) -> str:
    told = ", ".join(part for part in (one["system"], *one["gpus"]) if part)
    return f"{one['name']} ({told or 'no GPU named'})"
