"""Which replica of an expert a token goes to: every choice judged on one placement, in balance and in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moesim.errors import BadInput, OutsideProfile
from moesim.spec.plan import PlacementRequest
from moesim.spec.scenario import Scenario
from placement.compare import Split, refit
from placement.costs import CostOf, no_cost, with_cost
from placement.judge import Figure
from placement.problem import solve
from placement.steps import TOKENS_PER_RANK, judged_split, with_interval

REFERENCE = "equal"
"""What gains are told against: every replica serves the same part, and nothing is waited for."""


@dataclass(frozen=True)
class ChoiceTimes:
    """Step times of a placement under each replica choice, by tokens per rank, on loads that it was not fitted to.

    step_s: tokens per rank -> choice -> seconds with their interval; balance: the same -> max/mean of a step, mean over
    layers and steps, on whole counts; gains: the same -> share of step time saved over REFERENCE, paired.
    unpriced: tokens per rank -> choice -> why it is not priced there. refused: tokens per rank -> why none runs.
    """

    judged: tuple[str, ...]
    modes: dict[int, str]
    step_s: dict[int, dict[str, Figure]]
    balance: dict[int, dict[str, float]]
    gains: dict[int, dict[str, Figure]]
    unpriced: dict[int, dict[str, str]]
    refused: dict[int, str] = field(default_factory=dict)

    def best(self, tokens: int) -> str:
        """The choice of the shortest step; REFERENCE unless another is surely shorter than it."""
        sure = [name for name, gain in self.gains[tokens].items() if gain.low > 0.0]
        return min(sure, key=lambda name: self.step_s[tokens][name].value, default=REFERENCE)

    def reasons(self) -> dict[str, list[str]]:
        """Why something is not priced -> the choices, each with the tokens per rank where that is so."""
        found: dict[str, dict[str, list[str]]] = {}
        for tokens, why in self.unpriced.items():
            for name, reason in why.items():
                found.setdefault(reason, {}).setdefault(name, []).append(str(tokens))
        return {
            reason: [f"{name} at {', '.join(tokens)}" for name, tokens in names.items()]
            for reason, names in found.items()
        }

    def to_json(self) -> dict[str, Any]:
        """One row for each number of tokens per rank."""
        rows = [
            {
                "tokens_per_rank": tokens,
                "dispatch_mode": self.modes[tokens],
                "best": self.best(tokens),
                "does_not_run": self.refused.get(tokens),
                "choices": {
                    name: {
                        "step_s": time.to_json(),
                        "per_step_max_over_mean": self.balance[tokens][name],
                        "gain": self.gains[tokens][name].to_json()
                        if name != REFERENCE and name in self.gains[tokens]
                        else None,
                    }
                    for name, time in times.items()
                },
            }
            for tokens, times in self.step_s.items()
        ]
        unpriced = [
            {"tokens_per_rank": tokens, "choice": name, "reason": reason}
            for tokens, reasons in self.unpriced.items()
            for name, reason in reasons.items()
        ]
        return {"judged_on": list(self.judged), "reference": REFERENCE, "rows": rows, "unpriced": unpriced}


def judge_choices(
    scenario: Scenario,
    splits: Sequence[Split],
    request: PlacementRequest,
    solver: str,
    draws: int,
    costs: CostOf = no_cost,
) -> ChoiceTimes:
    """Fit the plan to one split's first part and price its decode steps on the second under every replica choice.

    Choices that look at a batch are charged in every layer for the exchange of counts, the solve and the new map;
    `stale_lp`, which solves while the step before runs, for the map alone. Raises BadInput where there is no replica to
    choose, OutsideProfile where no size is priced.
    """
    from moesim.engine.deployment import groundwork, refuse_roles
    from moesim.engine.steptime import TimedPlacements, timed_choices
    from moesim.network.choice import CHOICES, STALE

    if request.slots == request.experts:
        raise BadInput("without replicas there is nothing to choose", where="--replica-choices", mend="ask more slots")
    if request.ranks == 1:
        raise BadInput("one rank holds everything", where="--replica-choices", mend="place on more GPUs")
    split, judge = judged_split(splits)
    placement = solve(with_cost(refit(request, split.fit), split.fit, costs), solver).placement
    refuse_roles(scenario)
    ground = groundwork(scenario)
    timed: dict[int, TimedPlacements] = {}
    unpriced: dict[int, dict[str, str]] = {}
    for tokens in TOKENS_PER_RANK:
        try:
            (timed[tokens],) = timed_choices(ground, placement, judge, [tokens], draws, request.seed)
            unpriced[tokens] = timed[tokens].left_out
        except OutsideProfile as error:
            outside = error
            unpriced[tokens] = dict.fromkeys((*CHOICES, STALE), error.line())
    if not timed:
        raise outside
    return ChoiceTimes(
        judged=tuple(load.name for load in judge),
        modes={tokens: row.mode for tokens, row in timed.items()},
        step_s={
            tokens: {name: with_interval(times) for name, times in row.step_s.items()} for tokens, row in timed.items()
        },
        balance={tokens: row.balance for tokens, row in timed.items()},
        gains={
            tokens: {name: with_interval(1.0 - times / row.step_s[REFERENCE]) for name, times in row.step_s.items()}
            if REFERENCE in row.step_s
            else {}
            for tokens, row in timed.items()
        },
        unpriced={tokens: why for tokens, why in unpriced.items() if why},
        refused={tokens: next(iter(row.refused.values())) for tokens, row in timed.items() if row.refused},
    )
