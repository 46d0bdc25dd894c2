"""After a first look at many plans: the leading ones simulated in full, so that every answer rests on full runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moesim.spec.scenario import Scenario
from placement.executors import Workers
from placement.plans import Plan
from placement.ranking import INDIFFERENCE, LATENCY, by_latency, pareto
from placement.tuner import Search, Trial

# Plans that are simulated in full: so many of the leading ones, and so many of the first look's Pareto front.
LEADERS, FRONT = 12, 12


def settled(search: Search, workers: Workers, scenario: Scenario, always: Sequence[Plan]) -> Search:
    """The search with its leaders, its front and the plans `always` simulated in full; only these can be the answer.

    In a search of roles also the most promising plan of each split, so that one can tell what the split is worth.

    Where no leader meets the service levels in full, the next ones are simulated, until one does or none is left.
    """
    order = _by_promise(search, scenario)
    front = pareto(search, scenario)
    spread = front[:: max(1, -(-len(front) // FRONT))]
    asked = [trial for trial in search.trials if trial.plan in always and trial.outcome.status == "ok"]
    batch = list({trial.number: trial for trial in [*order[:LEADERS], *spread, *asked, *_splits(order)]}.values())
    done: dict[int, Trial] = {}
    while batch:
        outcomes = workers.settle([trial.plan for trial in batch])
        done |= {trial.number: replace(trial, outcome=one) for trial, one in zip(batch, outcomes, strict=True)}
        if any(trial.outcome.recommendable for trial in done.values()):
            break
        batch = [trial for trial in order if trial.number not in done][:LEADERS]
    trials = tuple(done.get(trial.number, trial) for trial in search.trials)
    return replace(search, trials=trials, settled=frozenset(done))


def _splits(order: Sequence[Trial]) -> list[Trial]:
    """The first plan of each split of the GPUs over roles, none among them; empty where roles are not searched."""
    found: dict[str, Trial] = {}
    for trial in order:
        if trial.plan.roles is not None:
            found.setdefault(trial.plan.params()["split"], trial)
    return list(found.values())


def _by_promise(search: Search, scenario: Scenario) -> list[Trial]:
    """Trials that ran, the most promising first: service levels, then the objective, near ties by latency."""
    metric = scenario.objective.maximize
    ran = [trial for trial in search.trials if trial.outcome.status == "ok"]
    best = max((trial.outcome.metrics[metric] for trial in ran if trial.outcome.recommendable), default=0.0)

    latency = by_latency(ran)

    def key(trial: Trial) -> tuple[float, ...]:
        metrics, outcome = trial.outcome.metrics, trial.outcome
        if not outcome.recommendable:
            return (2.0, max(outcome.violation, 0.0), metrics[LATENCY])
        near = metrics[metric] >= best * (1 - 2 * INDIFFERENCE)
        return (0.0, 0.0, *latency(trial)) if near else (1.0, -metrics[metric], metrics[LATENCY])

    return sorted(ran, key=key)
