"""The pipeline stages of a run in words, shared by the terminal and the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesim.units import human_seconds


def stages_line(step: Mapping[str, Any], serving: Mapping[str, Any] | None) -> str:
    """`Stages: layers 0 to 29 11 ms, busy 82 % of the run; ...`; empty where there is one stage.

    step: the typical decode step of `simulate --json`; serving: what the loop did, None where it was not kept.
    """
    stages = step.get("stages") or ()
    if not stages:
        return ""
    busy = () if serving is None else serving.get("stage_busy") or ()
    told = []
    for index, stage in enumerate(stages):
        first, last = stage["layers"]
        share = f", busy {busy[index]:.0%} of the run" if index < len(busy) else ""
        told.append(f"layers {first} to {last} {human_seconds(stage['seconds'])}{share}")
    sent = sum(stage["to_the_next_s"] or 0.0 for stage in stages)
    return f"Stages of that step: {'; '.join(told)}; {human_seconds(sent)} between them."
