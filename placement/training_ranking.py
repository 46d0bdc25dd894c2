"""From training trials to an answer: the best plan, the Pareto front, paired differences, and one honest sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moesim.engine.draws import LEVEL, interval
from moesim.errors import Infeasible
from moesim.spec.scenario import ObjectiveSpec, Scenario
from placement.objective import MOST_EXTRAPOLATED
from placement.ranking import Finalist, finalists_of
from placement.training_objective import limits_of, objective_of
from placement.tuner import Search, Trial

# Less is better of these.
_TIMES = ("step_s", "dropped_fraction", "memory_peak_bytes")


def ranked_training(search: Search, scenario: Scenario) -> list[Trial]:
    """Trials that kept every bound, best first: by objective, equal ones by drops, then by memory.

    Raises Infeasible, with the nearest plan, when none does.
    """
    ran = search.answers
    if not ran:
        told = ", ".join(f"{reason} {count}" for reason, count in search.infeasible().items())
        raise Infeasible(
            f"no plan could be simulated ({told})", mend="run `moesim doctor` on the scenario", reason="nothing_ran"
        )
    sure = [trial for trial in ran if trial.outcome.metrics["extrapolated_share"] <= MOST_EXTRAPOLATED]
    good = [trial for trial in sure if trial.outcome.violation <= 0]
    if not good and all(trial.outcome.violation > 0 for trial in ran):
        near = min(ran, key=lambda trial: trial.outcome.violation)
        limits = limits_of(scenario.objective)
        missed = ", ".join(
            f"{name} {near.outcome.metrics[name]:.4g} against {limit:g}"
            for name, limit in limits.items()
            if near.outcome.metrics[name] > limit
        )
        raise Infeasible(
            f"no plan keeps the limits; nearest: {near.plan.label()}: {missed}",
            where="objective.limits",
            mend="relax the limit, or add GPUs",
            reason="limits",
        )
    if not good:
        raise Infeasible(
            f"every plan that keeps the limits lies over {MOST_EXTRAPOLATED:.0%} outside the profile",
            where="cost.extrapolate",
            mend="measure the missing points with `moesim profile`, or use cost.source roofline",
            reason="mostly_extrapolated",
        )
    name, sign = objective_of(scenario.objective)

    def key(trial: Trial) -> tuple[float, ...]:
        metrics = trial.outcome.metrics
        return (-sign * metrics[name], metrics["dropped_fraction"], metrics["step_s"], metrics["memory_peak_bytes"])

    return sorted(good, key=key)


def training_pareto(search: Search, second: str) -> list[Trial]:
    """Trials that no other beats in both the step time and `second`, the shortest step first."""
    name = "memory_peak_bytes" if second == "step_s" else second
    ran = sorted(
        search.answers, key=lambda trial: (trial.outcome.metrics["step_s"], trial.outcome.metrics[name], trial.number)
    )
    front: list[Trial] = []
    for trial in ran:
        if not front or trial.outcome.metrics[name] < front[-1].outcome.metrics[name]:
            front.append(trial)
    return front


def training_gain(best: Finalist, other: Finalist, metric: str) -> dict[str, float | None]:
    """Relative gain of best over other on common draws; of times, drops and memory the relative saving."""
    mine, theirs = best.drawn[metric], other.drawn[metric]
    shared = min(len(mine), len(theirs))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(mine[:shared] == theirs[:shared], 1.0, mine[:shared] / theirs[:shared])
    if not np.isfinite(ratio).all():
        return {"value": None, "low": None, "high": None}
    gains = 1.0 - ratio if metric in _TIMES else ratio - 1.0
    if shared < 2:
        return {"value": float(gains[0]), "low": None, "high": None}
    low, high = interval(gains[1:])
    return {"value": float(gains[0]), "low": float(low), "high": float(high)}


def tied_training(best: Finalist, other: Finalist, metric: str) -> bool:
    """Whether the interval of the paired difference holds 0; without draws nothing tells them apart."""
    gain = training_gain(best, other, metric)
    return gain["low"] is None or gain["high"] is None or gain["low"] <= 0.0 <= gain["high"]


def training_finalists(order: Sequence[Trial]) -> list[Trial]:
    """The best plan and its runners-up, one for each layout first."""
    return finalists_of(order)


def training_verdict(
    best: Finalist, base: Finalist | None, *, base_reason: str, objective: ObjectiveSpec, caveat: str
) -> dict[str, Any]:
    """A code and one honest sentence: gain, tie, dont, baseline_fails, withheld."""
    label, metric = best.trial.plan.label(), objective_of(objective)[0]
    if base is None:
        text = f"{label} can be trained; the scenario's own plan cannot be compared with it ({base_reason})."
        return {"code": "baseline_fails", "text": text + caveat}
    if base.trial.plan == best.trial.plan:
        return {"code": "dont", "text": f"Don't bother: the scenario's own plan is the best one found.{caveat}"}
    if base.trial.outcome.metrics["extrapolated_share"] > MOST_EXTRAPOLATED:
        return {"code": "withheld", "text": f"Verdict withheld: the yardstick is mostly a guess.{caveat}"}
    gain, step = training_gain(best, base, metric), training_gain(best, base, "step_s")
    if gain["low"] is None or gain["high"] is None:
        text = f"Verdict withheld: the gain of {label} in {metric} has no interval."
        return {"code": "withheld", "text": text + caveat}
    told = f"{metric} {_told(gain)}"
    if metric != "step_s":
        told += f", step time {_told(step)} saved"
    dropped, before = (one.trial.outcome.metrics["dropped_fraction"] for one in (best, base))
    if dropped != before:
        told += f", dropped {dropped:.2%} of the picks instead of {before:.2%}"
    missed = f", which misses the limits ({base_reason})" if base_reason else ""
    head = f"{label} against the scenario's own plan{missed}: {told} ({LEVEL:.0%} intervals, paired draws).{caveat}"
    if gain["low"] > 0.0:
        return {"code": "gain", "text": f"Worth it. {head}"}
    if base_reason:
        return {"code": "baseline_fails", "text": f"Worth it for the limits. {head}"}
    return {"code": "tie", "text": f"A tie: don't bother. {head}"}


def _told(gain: dict[str, float | None]) -> str:
    if gain["value"] is None or gain["low"] is None or gain["high"] is None:
        return "not comparable"
    return f"{gain['value']:+.1%} [{gain['low']:+.1%}, {gain['high']:+.1%}]"
