"""From trials to an answer: the best plan, the Pareto front, finalists compared paired, and one honest sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.engine.draws import LEVEL, interval
from moesim.errors import Infeasible
from moesim.spec.scenario import Scenario
from placement.objective import MOST_EXTRAPOLATED
from placement.plans import Plan
from placement.pools import Pool
from placement.surrogate import front_of
from placement.tuner import Search, Trial

# An open loop serves what is offered under every plan that keeps up; how a finite run ends moves its rate by a percent
# or two. Plans whose objectives are closer than this are ranked by latency.
INDIFFERENCE = 0.02
FINALISTS = 4
LATENCY = "tpot_s.p50"
SHOWN = (
    "output_tokens_per_s_per_gpu",
    "ttft_s.p50",
    "ttft_s.p99",
    "tpot_s.p50",
    "tpot_s.p99",
    "rank_load_max_over_mean",
    "memory_peak_bytes",
)


@dataclass(frozen=True)
class Finalist:
    """A plan simulated again under the joint draws that all finalists share: metric -> [draws + 1], first as known."""

    trial: Trial
    drawn: dict[str, NDArray[np.float64]]

    def interval(self, metric: str) -> dict[str, float]:
        """The 90 % interval of a metric."""
        low, high = interval(self.drawn[metric][1:]) if len(self.drawn[metric]) > 1 else (self.drawn[metric][0],) * 2
        return {"low": float(low), "high": float(high), "level": LEVEL}


def ranked(search: Search, scenario: Scenario) -> list[Trial]:
    """Trials that met every service level, best first: by objective, near ties by median time per output token.

    Raises Infeasible, with the nearest plan, when none does.
    """
    metric = scenario.objective.maximize
    ran = search.answers
    good = [trial for trial in ran if trial.outcome.recommendable]
    if not good:
        if not ran:
            told = ", ".join(f"{reason} {count}" for reason, count in search.infeasible().items())
            raise Infeasible(
                f"no plan could be simulated ({told})", mend="run `moesim doctor` on the scenario", reason="nothing_ran"
            )
        near = min(ran, key=lambda trial: trial.outcome.violation)
        if near.outcome.violation <= 0:
            raise Infeasible(
                f"every plan that meets the service levels lies over {MOST_EXTRAPOLATED:.0%} outside the profile",
                where="cost.extrapolate",
                mend="measure the missing points with `moesim profile`",
                reason="mostly_extrapolated",
            )
        raise Infeasible(
            f"no plan meets the service levels; nearest: {near.plan.label()}, {near.outcome.violation:.0%} over",
            where="objective.slo",
            mend="relax the level, lower the load or add GPUs",
            reason="slo",
        )
    return order(good, metric)


def order(good: Sequence[Trial], metric: str) -> list[Trial]:
    """Trials by objective, those close to the best first and among themselves by median time per output token."""
    best = max((trial.outcome.metrics[metric] for trial in good), default=0.0)
    near_best = [trial for trial in good if trial.outcome.metrics[metric] >= best * (1 - INDIFFERENCE)]
    others = [trial for trial in good if trial.outcome.metrics[metric] < best * (1 - INDIFFERENCE)]
    near_best.sort(key=by_latency(near_best))
    others.sort(key=lambda trial: -trial.outcome.metrics[metric])
    return near_best + others


def by_latency(trials: Sequence[Trial]) -> Callable[[Trial], tuple[float, float]]:
    """Sorts trials by median time per output token; those of one decode pool, which it hardly tells apart, by TTFT."""
    least: dict[Pool, float] = {}
    for trial in trials:
        if trial.plan.prefill is not None:
            pool, found = trial.plan.decode, trial.outcome.metrics[LATENCY]
            least[pool] = min(found, least.get(pool, found))

    def key(trial: Trial) -> tuple[float, float]:
        found = trial.outcome.metrics[LATENCY]
        if trial.plan.prefill is None:
            return (found, 0.0)
        floor = least[trial.plan.decode]
        near = found <= floor * (1 + INDIFFERENCE)
        return (floor if near else found, trial.outcome.metrics["ttft_s.p50"])

    return key


def finalists_of(order: Sequence[Trial]) -> list[Trial]:
    """The best plan and its runners-up, one for each layout first, so that the table shows real alternatives.

    Where plans with and without roles compete, the better one of the other kind is among them.
    """
    chosen = [order[0]]
    chosen += [trial for trial in order if (trial.plan.prefill is None) != (order[0].plan.prefill is None)][:1]
    for trial in order[1:]:
        if len(chosen) < FINALISTS and all(trial.plan.layout != other.plan.layout for other in chosen):
            chosen.append(trial)
    for trial in order[1:]:
        if len(chosen) < FINALISTS and trial not in chosen:
            chosen.append(trial)
    return sorted(chosen, key=order.index)


def pareto(search: Search, scenario: Scenario) -> list[Trial]:
    """Trials that ran and that no other beats in both the objective and the median time per output token."""
    metric = scenario.objective.maximize
    ran = search.answers
    goals = [(trial.outcome.metrics[metric], trial.outcome.metrics[LATENCY]) for trial in ran]
    return [ran[index] for index in front_of(np.asarray(goals).reshape(-1, 2))]


def paired_gain(best: Finalist, base: Finalist, metric: str) -> dict[str, float]:
    """Relative gain of best over base on common draws; for latencies, the relative saving.

    Where either has no draws (one of them left the profile), the value stands for its own interval: see `has_draws`.
    """
    shared = min(len(best.drawn[metric]), len(base.drawn[metric]))
    ratio = best.drawn[metric][:shared] / base.drawn[metric][:shared]
    gains = ratio - 1.0 if metric.endswith("_per_gpu") else 1.0 - ratio
    low, high = interval(gains[1:]) if len(gains) > 1 else (float(gains[0]), float(gains[0]))
    return {"value": float(gains[0]), "low": low, "high": high}


def gain_json(best: Finalist, base: Finalist, metric: str) -> dict[str, float | None]:
    """A paired gain ready for JSON: without draws on both sides it has no interval."""
    gain = paired_gain(best, base, metric)
    return {**gain} if has_draws(best, base) else {"value": gain["value"], "low": None, "high": None}


def has_draws(*finalists: Finalist) -> bool:
    """Whether all were simulated under the joint draws, so that their gains have intervals."""
    return all(len(values) > 1 for one in finalists for values in one.drawn.values())


def tied(best: Finalist, other: Finalist, metric: str) -> bool:
    """Whether the interval of the paired difference holds 0; without draws nothing tells them apart."""
    gain = paired_gain(best, other, metric)
    return not has_draws(best, other) or gain["low"] <= 0.0 <= gain["high"]


def verdict(
    best: Finalist,
    base: Finalist | None,
    *,
    base_reason: str,
    scenario: Scenario,
    judged_on_fit: bool,
    gpus_per_node: int,
    nodes_validated: bool = False,
) -> dict[str, Any]:
    """A code and one honest sentence: gain, latency_gain, tie, dont, baseline_fails, withheld.

    nodes_validated: whether records cover all that happens between nodes.
    """
    compared = [("best plan", best)] + ([] if base is None else [("baseline", base)])
    caveat = ""
    if not nodes_validated and any(one.trial.plan.stage_gpus > gpus_per_node for _, one in compared):
        caveat = " Multi-node expert parallelism is not validated on hardware."
    if any(one.trial.plan.in_stages for _, one in compared):
        caveat += " Serving in pipeline stages is not validated on hardware."
    for name, one in reversed(compared):
        lean = one.trial.outcome.metrics["extrapolated_share"]
        if lean >= 0.005:
            caveat = f" {lean:.0%} of the {name}'s step time lies outside the profile.{caveat}"
    if judged_on_fit:
        text = "Verdict withheld: there is one snapshot of routing, so nothing was left to judge the plan on."
        return {"code": "withheld", "text": text + caveat}
    metric = scenario.objective.maximize
    if base is None and base_reason == "outside_profile":
        text = (
            "Verdict withheld: the plain baseline leaves the profile, so there is nothing to compare with; "
            "set cost: {extrapolate: allow} to price it by formula."
        )
        return {"code": "withheld", "text": text + caveat}
    if base is None:
        text = f"{best.trial.plan.label()} meets the service levels; the plain baseline does not ({base_reason})."
        return {"code": "baseline_fails", "text": text + caveat}
    if best.trial.plan == base.trial.plan:
        text = "Don't bother: the plain baseline is the best plan found."
        return {"code": "dont", "text": text + caveat}
    if not has_draws(best, base):
        text = (
            "Verdict withheld: some joint draws leave the profile, so the gain has no interval; "
            "set cost: {extrapolate: allow} to price them by formula."
        )
        return {"code": "withheld", "text": text + caveat}
    gain, saving = paired_gain(best, base, metric), paired_gain(best, base, LATENCY)
    name = metric.removesuffix("_per_gpu").replace("_per_s", "/s").replace("_", " ") + "/GPU"
    told = f"{name} {_signed(gain)}, median TPOT {_saved(saving)}"
    level = f"{LEVEL:.0%} intervals, paired draws, routing it was not fitted to"
    missed = f", which misses the service levels ({base_reason})" if base_reason else ""
    head = f"{best.trial.plan.label()} against the plain baseline{missed}: {told} ({level})."
    if base.trial.outcome.metrics["extrapolated_share"] > MOST_EXTRAPOLATED:
        text = (
            f"Verdict withheld: the yardstick is mostly a guess. {head}{caveat} {measured_yardstick(best.trial.plan)}"
        )
        return {"code": "withheld", "text": text}
    if gain["low"] > 0.0:
        return {"code": "gain", "text": f"Worth it. {head}{caveat}"}
    if base_reason:
        return {"code": "baseline_fails", "text": f"Worth it for the service levels. {head}{caveat}"}
    if saving["low"] > 0.0:
        throughput = "loses" if gain["high"] < 0.0 else "ties"
        return {"code": "latency_gain", "text": f"Throughput {throughput}, latency gains. {head}{caveat}"}
    if gain["high"] < 0.0 or saving["high"] < 0.0:
        return {"code": "dont", "text": f"Don't bother. {head}{caveat}"}
    return {"code": "tie", "text": f"A tie: don't bother. {head}{caveat}"}


def measured_yardstick(plan: Plan) -> str:
    """What would bring a verdict: the kernels that the baseline lacks, or a plan that was priced as the yardstick."""
    told = "For a verdict, measure or import the kernels that `moesim doctor` lists as extrapolated"
    if plan.roles is not None:
        return f"{told}."
    sizes = ("tp", "pp", "cp", "decode_cp", "attention_dp", "ep", "expert_tp")
    own = ", ".join(f"{name}: {size}" for name in sizes if (size := getattr(plan.parallel, name)) > 1)
    return (
        f"{told}, or make a layout that is measured the scenario's own, such as this plan's: "
        f"parallel: {{{own}}}, policies: {{dispatch: {{backend: {plan.backend}}}}}."
    )


def _signed(gain: dict[str, float]) -> str:
    """`+3.4 % [+2.6 %, +4.9 %]`."""
    return f"{gain['value']:+.1%} [{gain['low']:+.1%}, {gain['high']:+.1%}]"


def level_metrics(scenario: Scenario) -> dict[str, float]:
    """Service levels by flat metric name: `tpot_s.p99` -> seconds."""
    return {f"{name}.{statistic}": limit for (name, statistic), limit in scenario.objective.slo.limits().items()}


def sure_of_levels(finalist: Finalist, levels: dict[str, float]) -> bool | None:
    """Whether the service levels hold at the far end of every interval; None without draws or levels."""
    if not levels or not has_draws(finalist):
        return None
    return all(finalist.interval(metric)["high"] <= limit for metric, limit in levels.items())


def plan_json(trial: Trial, finalist: Finalist | None = None, levels: dict[str, float] | None = None) -> dict[str, Any]:
    """A plan with its figures, ready for JSON; levels: see level_metrics."""
    plan: Plan = trial.plan
    return {
        "label": plan.label(),
        "parallel": plan.parallel.model_dump(mode="json"),
        "backend": plan.backend,
        "schedule": plan.schedule,
        "solver": plan.solver,
        "redundant_experts": plan.redundant_experts,
        "options": dict(plan.options),
        "roles": plan.roles_json(),
        "trial": trial.number,
        "status": trial.outcome.status,
        "meets_slo": trial.outcome.status == "ok" and trial.outcome.violation <= 0,
        "metrics": trial.outcome.metrics,
        "slo_sure": None if finalist is None else sure_of_levels(finalist, levels or {}),
        "intervals": {}
        if finalist is None or not has_draws(finalist)
        else {metric: finalist.interval(metric) for metric in finalist.drawn},
    }


def _saved(saving: dict[str, float]) -> str:
    """`12 % lower [8 %, 15 %]`; a longer time has a negative saving."""
    word = "lower" if saving["value"] >= 0 else "higher"
    sign = 1.0 if saving["value"] >= 0 else -1.0
    low, high = sorted((sign * saving["low"], sign * saving["high"]))
    return f"{sign * saving['value']:.1%} {word} [{low:.1%}, {high:.1%}]"
