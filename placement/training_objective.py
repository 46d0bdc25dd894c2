"""What one training plan is worth: a step simulated once as best known, and again under joint draws for finalists."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from moesim.engine.training import TrainingRun, simulate_training
from moesim.engine.training_plan import SharedTraining
from moesim.errors import BadInput, Infeasible, MoesimError, OutsideProfile
from moesim.output.training_metrics import routing_figures, training_provenance
from moesim.spec.scenario import TRAINING_OBJECTIVES, ObjectiveSpec, Scenario
from placement.objective import Outcome
from placement.plans import Plan

Drawn = dict[str, NDArray[np.float64]]


def objective_of(objective: ObjectiveSpec) -> tuple[str, float]:
    """The metric that ranks plans, and +1 where more of it is better, -1 where less."""
    if objective.minimize is not None:
        return objective.minimize, -1.0
    return objective.maximize if objective.maximize in TRAINING_OBJECTIVES else "tokens_per_s_per_gpu", 1.0


def limits_of(objective: ObjectiveSpec) -> dict[str, float]:
    """Upper bounds by metric."""
    return {name: limit for name, limit in objective.limits if limit is not None}


def against(objective: ObjectiveSpec, *, drops: bool) -> str:
    """The metric that a search trades for step time: drops where a rule may drop, else memory; step time itself where
    the objective is one of these.
    """
    if objective_of(objective)[0] in ("dropped_fraction", "memory_headroom_bytes"):
        return "step_s"
    return "dropped_fraction" if drops else "memory_peak_bytes"


class TrainingEvaluator:
    """Evaluates plans of one training scenario."""

    def __init__(self, scenario: Scenario, shared: SharedTraining | None = None) -> None:
        self.scenario = scenario
        self.shared = shared or SharedTraining()
        self.second = against(scenario.objective, drops=scenario.policies.capacity.rule != "dropless")

    def run(self, plan: Plan, *, draws: int = 0) -> TrainingRun:
        """Simulate a plan. Raises Infeasible, BadInput and OutsideProfile."""
        return simulate_training(plan.apply(self.scenario), draws=draws, shared=self.shared)

    def evaluate(self, plan: Plan) -> Outcome:
        """Simulate a plan once; what cannot run becomes an outcome with its reason."""
        try:
            run = self.run(plan)
        except OutsideProfile as error:
            return Outcome("outside_profile", detail=error.line())
        except Infeasible as error:
            return Outcome(error.reason, detail=error.line())
        except BadInput as error:
            return Outcome("contradictory", detail=error.line())
        metrics = training_metrics(run)
        name, sign = objective_of(self.scenario.objective)
        return Outcome(
            "ok",
            metrics,
            violation(metrics, limits_of(self.scenario.objective)),
            aims=(sign * metrics[name], metrics[self.second]),
        )

    def settle(self, plan: Plan) -> Outcome:
        """The same: every trial of a training search is a full run."""
        return self.evaluate(plan)

    def draw(self, plan: Plan, draws: int) -> Drawn:
        """Rates and times as best known (entry 0) and under joint draws; only entry 0 where a draw leaves the profile.

        Memory and drops do not depend on the draws of costs; they stand in each entry.
        """
        run = self.run(plan, draws=draws)
        fixed = training_metrics(run)
        rows = [{**fixed, **run.rates(one.step_s)} for one in (run.step, *run.drawn)]
        return {name: np.asarray([row[name] for row in rows]) for name in fixed}


def training_metrics(run: TrainingRun) -> dict[str, float]:
    """Flat figures of a step as best known."""
    memory, routing = run.model.memory, routing_figures(run)
    provenance = training_provenance(run)
    return {
        **run.rates((run.faulted or run.step).step_s),
        "dropped_fraction": float(routing["dropped_fraction"]),
        "rank_load_max_over_mean": float(routing["max_over_mean"]),
        "memory_peak_bytes": memory.peak_bytes,
        "memory_headroom_bytes": memory.limit_bytes - memory.peak_bytes,
        "memory_share": memory.peak_bytes / memory.limit_bytes,
        "extrapolated_share": provenance.get("extrapolated", 0.0),
    }


def violation(metrics: dict[str, float], limits: dict[str, float]) -> float:
    """How far the worst bound is missed, as a share of it (of 1, where the bound is 0); at most 0: all are kept."""
    return max(((metrics[name] - limit) / (limit or 1.0) for name, limit in limits.items()), default=0.0)


class TrainingWorkers:
    """Trials in this process, or in a pool of spawned ones; outcomes in the order asked."""

    def __init__(self, evaluator: TrainingEvaluator, pool: ProcessPoolExecutor | None, count: int = 1) -> None:
        self.evaluator, self.pool, self.count = evaluator, pool, count

    def evaluate(self, plans: Sequence[Plan]) -> Iterator[Outcome]:
        """Outcomes of the plans, in their order, each when it is there. Raises MoesimError where a worker dies."""
        if self.pool is None:
            yield from map(self.evaluator.evaluate, plans)
            return
        try:
            yield from self.pool.map(functools.partial(_evaluate, self.evaluator.scenario.model_dump_json()), plans)
        except BrokenProcessPool:
            raise MoesimError(
                "a worker process died", mend="run again with --resume, with fewer --workers if memory is short"
            ) from None

    def settle(self, plans: Sequence[Plan]) -> list[Outcome]:
        """The same as `evaluate`."""
        return list(self.evaluate(plans))

    def draw(self, plans: Sequence[Plan], draws: int, metrics: Sequence[str]) -> list[Drawn]:
        """Metrics of each plan as best known (entry 0) and under the same joint draws; in this process."""
        return [{name: rows[name] for name in metrics} for rows in (self.evaluator.draw(one, draws) for one in plans)]


@contextmanager
def training_workers(evaluator: TrainingEvaluator, count: int) -> Iterator[TrainingWorkers]:
    """Workers for a run: this process for one, else a pool of spawned processes."""
    if count <= 1:
        yield TrainingWorkers(evaluator, None)
        return
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        yield TrainingWorkers(evaluator, pool, count)


@functools.lru_cache(maxsize=1)
def _here(scenario: str) -> TrainingEvaluator:
    return TrainingEvaluator(Scenario.model_validate_json(scenario))


def _evaluate(scenario: str, plan: Plan) -> Outcome:
    return _here(scenario).evaluate(plan)
