"""Judging a placement in step time, on loads that it was not fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import OutsideProfile
from moesim.routing.trace import RoutingCounts
from moesim.spec.plan import PlacementRequest
from moesim.spec.scenario import Scenario
from placement.compare import BASELINE, PLANNED, WITHOUT_REPLICAS, Split, contenders, refit
from placement.costs import CostOf, no_cost, with_cost
from placement.judge import Figure

TOKENS_PER_RANK = (8, 32, 128, 512)
"""Where every placement figure is given in time."""


@dataclass(frozen=True)
class StepTime:
    """Step times on held-out loads by tokens per rank, and what the plan gains over two references.

    step_s: tokens per rank -> contender -> seconds with their interval; per_step: the same -> max/mean of a step.
    unpriced: tokens per rank that the profile does not cover -> why; they are left out, and the verdict says so.
    """

    judged: tuple[str, ...]
    modes: dict[int, str]
    step_s: dict[int, dict[str, Figure]]
    per_step: dict[int, dict[str, float]]
    gains: dict[int, Figure]
    replicas: dict[int, Figure]
    unpriced: dict[int, str]

    def to_json(self) -> dict[str, Any]:
        """One row for each number of tokens per rank."""
        rows = []
        for tokens, times in self.step_s.items():
            row: dict[str, Any] = {
                "tokens_per_rank": tokens,
                "dispatch_mode": self.modes[tokens],
                "step_s": {name: time.to_json() for name, time in times.items()},
                "per_step_max_over_mean": self.per_step[tokens],
                "gain": self.gains[tokens].to_json(),
            }
            if tokens in self.replicas:
                row["gain_from_replicas"] = self.replicas[tokens].to_json()
            rows.append(row)
        unpriced = [{"tokens_per_rank": tokens, "reason": reason} for tokens, reason in self.unpriced.items()]
        return {"judged_on": list(self.judged), "rows": rows, "unpriced": unpriced}


def judge_steps(
    scenario: Scenario,
    splits: Sequence[Split],
    request: PlacementRequest,
    solver: str,
    draws: int,
    costs: CostOf = no_cost,
) -> StepTime:
    """Price the contenders' steps on the first split that holds a decode load out (else the first).

    8 to 512 tokens per rank are sizes of decode steps, so where a decode load is held out, it alone judges.
    """
    from moesim.engine.deployment import groundwork, refuse_roles
    from moesim.engine.steptime import TimedPlacements, timed_placements

    split, judge = judged_split(splits)
    found = contenders(with_cost(refit(request, split.fit), split.fit, costs), solver)
    refuse_roles(scenario)
    ground = groundwork(scenario)
    timed: dict[int, TimedPlacements] = {}
    unpriced: dict[int, str] = {}
    for tokens in TOKENS_PER_RANK:
        try:
            (timed[tokens],) = timed_placements(ground, found, judge, [tokens], draws, request.seed)
        except OutsideProfile as error:
            unpriced[tokens] = error.line()
            outside = error
    if not timed:
        raise outside
    replicas = {}
    if WITHOUT_REPLICAS in found:
        replicas = {tokens: gain_over(row.step_s, WITHOUT_REPLICAS) for tokens, row in timed.items()}
    return StepTime(
        judged=tuple(load.name for load in judge),
        modes={tokens: row.mode for tokens, row in timed.items()},
        step_s={
            tokens: {name: with_interval(times) for name, times in row.step_s.items()} for tokens, row in timed.items()
        },
        per_step={tokens: row.balance for tokens, row in timed.items()},
        gains={tokens: gain_over(row.step_s, BASELINE) for tokens, row in timed.items()},
        replicas=replicas,
        unpriced=unpriced,
    )


def judged_split(splits: Sequence[Split]) -> tuple[Split, list[RoutingCounts]]:
    """The first split that holds a decode load out (else the first), and its loads that judge: decode alone if any."""

    def decodes(split: Split) -> list[RoutingCounts]:
        return [load for load in split.judge if load.phase == "decode"]

    split = next((found for found in splits if decodes(found)), splits[0])
    return split, decodes(split) or list(split.judge)


def with_interval(values: NDArray[np.float64]) -> Figure:
    """The figure as best known (entry 0) with the interval of its joint draws (the others)."""
    from moesim.engine.draws import LEVEL, interval

    low, high = interval(values[1:])
    return Figure(float(values[0]), low, high, LEVEL)


def gain_over(step_s: Mapping[str, NDArray[np.float64]], reference: str) -> Figure:
    """1 - time of the plan / time of `reference`, draw by draw: the two share every draw."""
    return with_interval(1.0 - step_s[PLANNED] / step_s[reference])
