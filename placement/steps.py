"""Judging a placement in step time, on loads that it was not fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import OutsideProfile
from moesim.routing.trace import RoutingCounts
from moesim.spec.plan import PlacementRequest
from moesim.spec.scenario import Scenario
from placement.compare import BASELINE, PLANNED, WITHOUT_REPLICAS, Split, contenders, refit
from placement.costs import CostOf, no_cost, with_cost
from placement.judge import Figure
from placement.verdict import tokens_list

if TYPE_CHECKING:
    from moesim.engine.steptime import TimedPlacements

TOKENS_PER_RANK = (8, 32, 128, 512)
"""Where every placement figure is given in time."""


LABELS = {WITHOUT_REPLICAS: "no replicas"}
"""Contenders that a person reads under another name."""


@dataclass(frozen=True)
class StepTime:
    """Step times on held-out loads by tokens per rank, and what the plan gains over two references.

    step_s: tokens per rank -> contender -> seconds with their interval; per_step: the same -> max/mean of a step.
    gains, replicas: tokens per rank -> gain over contiguous, over the plan without replicas; where both are priced.
    unpriced: tokens per rank that the profile does not cover -> why. left_out: tokens per rank -> contender that the
    profile does not cover there -> why. extrapolated: the same -> cost families priced beyond what was measured.
    refused: tokens per rank -> why the plan never runs such a batch; the verdict leaves these out and says so.
    """

    judged: tuple[str, ...]
    modes: dict[int, str]
    step_s: dict[int, dict[str, Figure]]
    per_step: dict[int, dict[str, float]]
    gains: dict[int, Figure]
    replicas: dict[int, Figure]
    unpriced: dict[int, str]
    left_out: dict[int, dict[str, str]] = field(default_factory=dict)
    extrapolated: dict[int, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)

    def that_run(self, gains: Mapping[int, Figure]) -> dict[int, Figure]:
        """The gains at batch sizes that the plan runs."""
        return {tokens: gain for tokens, gain in gains.items() if tokens not in self.refused}

    def notes(self) -> list[str]:
        """What the table leaves out, prices beyond the profile, or shows though it does not run, a line each."""
        found = [f"not priced at {tokens} tokens per GPU: {reason}" for tokens, reason in self.unpriced.items()]
        if self.left_out:
            why = next(iter(next(iter(self.left_out.values())).values()))
            found.append(f"not priced: {where(self.left_out)} tokens per GPU; the first: {why}")
        if self.extrapolated:
            families = sorted({one for row in self.extrapolated.values() for each in row.values() for one in each})
            found.append(
                f"~ extrapolated beyond what was measured ({', '.join(families)}): "
                f"{where(self.extrapolated)} tokens per GPU"
            )
        found += [f"does not run at {tokens} tokens per GPU: {reason}" for tokens, reason in self.refused.items()]
        return found

    def to_json(self) -> dict[str, Any]:
        """One row for each number of tokens per rank."""
        rows = []
        for tokens, times in self.step_s.items():
            row: dict[str, Any] = {
                "tokens_per_rank": tokens,
                "dispatch_mode": self.modes[tokens],
                "step_s": {name: time.to_json() for name, time in times.items()},
                "per_step_max_over_mean": self.per_step[tokens],
                "gain": self.gains[tokens].to_json() if tokens in self.gains else None,
                "runs": tokens not in self.refused,
                "left_out": self.left_out.get(tokens, {}),
                "extrapolated": {name: list(found) for name, found in self.extrapolated.get(tokens, {}).items()},
            }
            if tokens in self.refused:
                row["does_not_run"] = self.refused[tokens]
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
    from moesim.engine.steptime import timed_placements

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
    return StepTime(
        judged=tuple(load.name for load in judge),
        modes={tokens: row.mode for tokens, row in timed.items()},
        step_s={
            tokens: {name: with_interval(times) for name, times in row.step_s.items()} for tokens, row in timed.items()
        },
        per_step={tokens: row.balance for tokens, row in timed.items()},
        gains=_gains(timed, BASELINE),
        replicas=_gains(timed, WITHOUT_REPLICAS),
        unpriced=unpriced,
        left_out={tokens: row.left_out for tokens, row in timed.items() if row.left_out},
        extrapolated={tokens: row.extrapolated for tokens, row in timed.items() if row.extrapolated},
        refused={tokens: row.refused[PLANNED] for tokens, row in timed.items() if PLANNED in row.refused},
    )


def _gains(timed: Mapping[int, TimedPlacements], reference: str) -> dict[int, Figure]:
    """What the plan gains over a contender, at the batch sizes where both are priced."""
    return {
        tokens: gain_over(row.step_s, reference)
        for tokens, row in timed.items()
        if PLANNED in row.step_s and reference in row.step_s
    }


def where(found: Mapping[int, Mapping[str, object]]) -> str:
    """`contiguous at 32 and 128, no replicas at 128`, from tokens per rank -> contender -> anything."""
    sizes: dict[str, list[int]] = {}
    for tokens, names in found.items():
        for name in names:
            sizes.setdefault(LABELS.get(name, name), []).append(tokens)
    return ", ".join(f"{name} at {tokens_list(tokens)}" for name, tokens in sizes.items())


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
