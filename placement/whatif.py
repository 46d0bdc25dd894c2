"""What would change the answer: the finalists simulated again in worlds that differ in one thing from the scenario.

A world changes the workload, the routing that the plan meets (placements stay as they were fitted), or what a family of
operations costs. Only the finalists compete in it: that the best of them stays does not say that no plan outside would
do better there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moesim.cost.estimate import CostModel, Estimate
from moesim.cost.ops import Operation
from moesim.cost.overlap import MeasuresOverlap, Slowdown
from moesim.engine.deployment import Groundwork
from moesim.errors import BadInput
from moesim.routing.trace import RoutingCounts, at_most
from moesim.spec.scenario import Scenario
from moesim.spec.workload import WorkloadSpec
from placement.objective import Evaluator, Outcome
from placement.plans import Plan
from placement.ranking import INDIFFERENCE, LATENCY, order
from placement.tuner import Trial

NETWORK = ("dispatch", "collective")
HALVINGS = 3
"""Steps of bisection to where the answer turns: a factor of 2 is cut into 8 parts."""

Change = Callable[[Groundwork, float], Groundwork]


@dataclass(frozen=True)
class World:
    """One thing that may differ. factors: of what `apply` changes, 1 being the scenario's own; words: a factor told."""

    name: str
    words: Callable[[float], str]
    factors: tuple[float, ...]
    apply: Change


@dataclass(frozen=True)
class Scaled:
    """A cost model with the prices of some families multiplied; a CostModel."""

    costs: CostModel
    scale: Mapping[str, float]

    def estimate(self, operation: Operation) -> Estimate:
        """Price one operation. Raises what the model beneath raises."""
        one = self.costs.estimate(operation)
        factor = self.scale.get(one.family, 1.0)
        return one if factor == 1.0 else replace(one, seconds=one.seconds * factor)

    def overlap(self, work: str, gpus: int, nodes: int) -> Slowdown | None:
        """What the model beneath measured; implements MeasuresOverlap."""
        return self.costs.overlap(work, gpus, nodes) if isinstance(self.costs, MeasuresOverlap) else None


def worlds_of(scenario: Scenario) -> list[World]:
    """The worlds that a serving scenario can be asked about."""
    serving = scenario.serving
    assert serving is not None
    workload, found = serving.workload, []
    if workload.arrivals is not None or workload.file is not None:
        found.append(World("load", times("the load"), (0.5, 2.0), _with_workload(_load)))
    if workload.isl is not None:
        found.append(World("isl", times("the prompts' length"), (0.5, 2.0), _with_workload(_length("isl"))))
        found.append(World("osl", times("the answers' length"), (0.5, 2.0), _with_workload(_length("osl"))))
    found.append(World("skew", _skew_told, (0.0, 0.5, 1.5), _skewed))
    found.append(World("network", times("the time of exchanges and collectives"), (0.5, 2.0, 4.0), _priced(NETWORK)))
    found.append(World("experts", times("the time of expert products"), (0.75, 1.5), _priced(("experts",))))
    found.append(World("host", times("the overhead of a step"), (0.0, 3.0), _priced(("overhead",))))
    return found


def times(what: str) -> Callable[[float], str]:
    """Words of a factor: `2 x the load`."""
    return lambda factor: f"{factor:.3g} x {what}"


def _skew_told(exponent: float) -> str:
    if exponent == 0.0:
        return "even routing"
    return f"{'flatter' if exponent < 1.0 else 'steeper'} routing (shares^{exponent:g})"


def _with_workload(change: Callable[[WorkloadSpec, float], WorkloadSpec]) -> Change:
    def apply(ground: Groundwork, factor: float) -> Groundwork:
        serving = ground.scenario.serving
        assert serving is not None
        changed = serving.model_copy(update={"workload": change(serving.workload, factor)})
        return replace(ground, scenario=ground.scenario.model_copy(update={"serving": changed}))

    return apply


def _load(workload: WorkloadSpec, factor: float) -> WorkloadSpec:
    arrivals = workload.arrivals
    if arrivals is None:
        return workload.model_copy(update={"speed": (workload.speed or 1.0) * factor})
    if arrivals.concurrency is not None:
        found = arrivals.model_copy(update={"concurrency": max(1, round(arrivals.concurrency * factor))})
    else:
        name = "poisson" if arrivals.poisson is not None else "gamma"
        one = getattr(arrivals, name)
        faster = one.model_copy(update={"requests_per_s": one.requests_per_s * factor})
        found = arrivals.model_copy(update={name: faster})
    return workload.model_copy(update={"arrivals": found})


def _length(name: str) -> Callable[[WorkloadSpec, float], WorkloadSpec]:
    def change(workload: WorkloadSpec, factor: float) -> WorkloadSpec:
        return workload.model_copy(update={name: max(1, round(getattr(workload, name) * factor))})

    return change


def _skewed(ground: Groundwork, exponent: float) -> Groundwork:
    most = 1.0 / ground.model.moe.top_k
    return replace(ground, judge=tuple(tempered(load, exponent, most) for load in ground.judge))


def tempered(load: RoutingCounts, exponent: float, most: float) -> RoutingCounts:
    """The load with every layer's shares raised to a power, its tokens kept: 0 is even, above 1 is more skewed.

    most: the largest share that an expert can have (one pick of every token's k: 1 / k); what a share would have above
    it goes to the others, in proportion.
    """
    counts = load.counts.astype(np.float64)
    total = counts.sum(axis=-1, keepdims=True)
    share = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0) ** exponent
    share /= share.sum(axis=-1, keepdims=True)
    return replace(load, counts=at_most(share, most) * total)


def _priced(families: Sequence[str]) -> Change:
    def apply(ground: Groundwork, factor: float) -> Groundwork:
        return replace(ground, costs=Scaled(ground.costs, dict.fromkeys(families, factor)))

    return apply


def what_if(evaluator: Evaluator, plans: Sequence[Plan], worlds: Sequence[World] | None = None) -> dict[str, Any]:
    """Simulate every plan in every world, find the best there, and where between 1 and a factor the answer turns.

    plans: the best first. Placements are those that `evaluator` has solved or solves now, on the scenario's own loads.
    """
    metric = evaluator.scenario.objective.maximize
    changes = []
    for world in worlds_of(evaluator.scenario) if worlds is None else worlds:
        for factor in world.factors:
            trials = _trials(evaluator, world, factor, plans)
            winner = _winner(trials, metric)
            changed = winner is None or _beats(trials, winner, plans[0], metric)
            turns = None
            if winner is not None and changed and factor > 0.0:
                turns = _turn(evaluator, world, factor, plans[0], winner, metric)
            changes.append(
                {
                    "what": world.name,
                    "told": world.words(factor),
                    "factor": factor,
                    "best": (plans[0] if not changed else winner).label() if winner is not None else None,
                    "changed": changed,
                    "turns_at": turns,
                    "plans": [_row(trial, metric) for trial in trials],
                }
            )
    return {"plans": [plan.label() for plan in plans], "metric": metric, "changes": changes, "text": _text(changes)}


def _trials(evaluator: Evaluator, world: World, factor: float, plans: Sequence[Plan]) -> list[Trial]:
    ground = world.apply(evaluator.ground, factor)
    there = Evaluator(ground, ground.scenario)
    for plan in plans:
        if plan.prefill is not None:
            evaluator.placements(plan)
        else:
            evaluator.placement(plan)
    there.solved = evaluator.solved
    return [Trial(number, plan, _settled(there, plan)) for number, plan in enumerate(plans)]


def _settled(there: Evaluator, plan: Plan) -> Outcome:
    """The outcome of a plan in a world; a world that contradicts the plan costs that plan its place, not the answer."""
    try:
        return there.settle(plan)
    except BadInput as error:
        return Outcome("contradictory", detail=error.line())


def _winner(trials: Sequence[Trial], metric: str) -> Plan | None:
    good = [trial for trial in trials if trial.outcome.recommendable]
    return order(good, metric)[0].plan if good else None


def _beats(trials: Sequence[Trial], winner: Plan, best: Plan, metric: str) -> bool:
    """Whether the winner is another plan, and by more than what is told apart: in the objective, else in latency."""
    if winner == best:
        return False
    by_plan = {trial.plan: trial for trial in trials}
    mine, other = by_plan[best].outcome, by_plan[winner].outcome
    if not mine.recommendable:
        return True
    if other.metrics[metric] > mine.metrics[metric] * (1.0 + INDIFFERENCE):
        return True
    return other.metrics[LATENCY] < mine.metrics[LATENCY] * (1.0 - INDIFFERENCE)


def _turn(evaluator: Evaluator, world: World, factor: float, best: Plan, winner: Plan, metric: str) -> float:
    """The factor nearest to 1 from which on the winner is ahead of the best, by bisection of its logarithm."""
    near, far = 0.0, math.log(factor)
    for _ in range(HALVINGS):
        middle = (near + far) / 2.0
        trials = _trials(evaluator, world, math.exp(middle), [best, winner])
        found = _winner(trials, metric)
        if found is None or _beats(trials, found, best, metric):
            far = middle
        else:
            near = middle
    return math.exp(far)


def _row(trial: Trial, metric: str) -> dict[str, Any]:
    outcome = trial.outcome
    ran = outcome.status == "ok"
    return {
        "label": trial.plan.label(),
        "status": outcome.status,
        "meets_slo": ran and outcome.violation <= 0,
        "over": max(outcome.violation, 0.0) if ran else None,
        "metrics": {name: outcome.metrics[name] for name in dict.fromkeys((metric, LATENCY))} if ran else {},
    }


def _text(changes: Sequence[Mapping[str, Any]]) -> str:
    """What turns the answer, in a few sentences."""
    told: list[str] = []
    for change in changes:
        if not change["changed"]:
            continue
        if change["best"] is None:
            told.append(f"{change['told']}: no finalist meets the service levels")
        else:
            at = "" if change["turns_at"] is None else f" (from about {change['turns_at']:.2g} x on)"
            told.append(f"{change['told']}: {change['best']}{at}")
    kept = [change["told"] for change in changes if not change["changed"]]
    head = f"What would change the answer: {'; '.join(told)}." if told else "Nothing that was tried changes the answer."
    tail = f" It stays with {'; '.join(kept)}." if kept else ""
    return f"{head}{tail} Only the finalists were compared there."
