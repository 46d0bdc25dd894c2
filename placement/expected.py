"""What `place` tells of the workloads that it was asked to place for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moesim.routing.foretell import Described, Expected, leave_out, powers
from moesim.routing.trace import RoutingCounts


def expect_json(loads: Sequence[RoutingCounts], expected: Expected | None) -> dict[str, Any] | None:
    """The workloads, of what their loads are made, and how well the files foretell each other; None without any."""
    if expected is None:
        return None
    known = [Described.of(load) for load in loads]
    workloads = []
    for one in expected.workloads:
        made = powers(known, one)
        named = {load.name: float(power) for load, power in zip(loads, made, strict=True)}
        workloads.append({"phase": one.phase, "prompt_tokens": one.prompt_tokens, "powers": named})
    missed = [
        {"load": one.name, "foretold": one.foretold, "mean": one.mean, "nearest": one.nearest}
        for one in leave_out(loads, expected.top_k)
    ]
    return {"share": expected.share, "workloads": workloads, "left_out": missed}


def expect_lines(told: dict[str, Any] | None, judged: bool) -> list[str]:
    """The same in words; judged: whether fits to a part of the files are judged on the rest."""
    if told is None:
        return []
    names = ", ".join(str(Described(one["phase"], one["prompt_tokens"])) for one in told["workloads"])
    lines = [f"Placed for {names}: {told['share']:.0%} of the fit's weight is the load that the files foretell of it."]
    if judged:
        lines[0] += " Judged fits were told the phase and the prompts of what they are judged on, not its load."
    if told["left_out"]:
        foretold, mean, nearest = (
            float(np.mean([one[name] for one in told["left_out"]])) for name in ("foretold", "mean", "nearest")
        )
        lines.append(
            f"Left out, a file lies {foretold:.2f} of an even share from what the others foretell of it, {nearest:.2f} "
            f"from the nearest of them and {mean:.2f} from their mean."
        )
        if foretold >= mean:
            lines.append("The files do not foretell each other better than their mean does: leave routing.expect out.")
    return lines
