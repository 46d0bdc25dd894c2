"""What explains a step, and how a batch's way through pipeline stages is explained by that of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.graph.stages import TRANSFER

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class StepParts:
    """The fields of an ExplainedStep that tell of times."""

    step_s: float
    critical_path_s: dict[str, float]
    busy_s: dict[str, float]
    exposed_s: Floats
    waited_s: Floats
    waited_for_operation_s: dict[str, Floats]
    waited_for_rank_s: Floats
    what_if_s: dict[str, float]
    free_operation_s: dict[str, float]
    exchange_evened: bool


def one_after_another(parts: Sequence[StepParts], sent_s: float) -> StepParts:
    """The times of a batch that passes through all stages: sums, and the ranks of one stage after another's.

    sent_s: of the transfers between stages, which take no time with an infinite network or without themselves.
    """
    operations = dict.fromkeys(name for one in parts for name in one.waited_for_operation_s)
    names = dict.fromkeys([*(name for one in parts for name in one.free_operation_s), TRANSFER])
    nothing = np.zeros(len(parts[0].waited_s))
    ideal = "infinite_network"
    whole = {
        "critical_path_s": _summed([one.critical_path_s for one in parts], {TRANSFER: sent_s}),
        "busy_s": _summed([one.busy_s for one in parts], {TRANSFER: sent_s}),
        "what_if_s": {
            name: sum(one.what_if_s[name] for one in parts) + (0.0 if name == ideal else sent_s)
            for name in parts[0].what_if_s
        },
        "free_operation_s": {
            name: sum(one.free_operation_s.get(name, one.step_s) for one in parts)
            + (0.0 if name == TRANSFER else sent_s)
            for name in names
        },
    }
    return StepParts(
        step_s=sum(one.step_s for one in parts) + sent_s,
        exposed_s=np.concatenate([one.exposed_s for one in parts]),
        waited_s=np.concatenate([one.waited_s for one in parts]),
        waited_for_operation_s={
            name: np.concatenate([one.waited_for_operation_s.get(name, nothing) for one in parts])
            for name in operations
        },
        waited_for_rank_s=np.concatenate([one.waited_for_rank_s for one in parts]),
        exchange_evened=all(one.exchange_evened for one in parts),
        **whole,
    )


def _summed(parts: Sequence[dict[str, float]], more: dict[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in (*parts, more):
        for name, seconds in part.items():
            found[name] = found.get(name, 0.0) + seconds
    return found
