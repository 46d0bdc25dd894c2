"""Where trials run: in this process, or in a pool of worker processes; outcomes come back in the order asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.engine.deployment import groundwork
from moesim.errors import MoesimError
from moesim.spec.scenario import Scenario
from placement.objective import Evaluator, Outcome, drawn_metrics
from placement.space import Plan

_THREAD_SETTINGS = (
    "OMP_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "POLARS_MAX_THREADS",
)


class Workers(Protocol):
    """Evaluates batches of plans."""

    def evaluate(self, plans: Sequence[Plan]) -> list[Outcome]:
        """Outcomes of the plans, in their order."""
        ...

    def settle(self, plans: Sequence[Plan]) -> list[Outcome]:
        """Outcomes of full runs, where `evaluate` only takes a first look."""
        ...

    def draw(self, plans: Sequence[Plan], draws: int, metrics: Sequence[str]) -> list[dict[str, NDArray[np.float64]]]:
        """Metrics of each plan as best known (entry 0) and under the same joint draws.

        Where a draw leaves the profile there is entry 0 alone.
        """
        ...


class LocalWorkers:
    """All trials in this process."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator

    def evaluate(self, plans: Sequence[Plan]) -> list[Outcome]:
        """Outcomes of the plans, in their order."""
        return [self.evaluator.evaluate(plan) for plan in plans]

    def settle(self, plans: Sequence[Plan]) -> list[Outcome]:
        """Outcomes of full runs, in their order."""
        return [self.evaluator.settle(plan) for plan in plans]

    def draw(self, plans: Sequence[Plan], draws: int, metrics: Sequence[str]) -> list[dict[str, NDArray[np.float64]]]:
        """Metrics of each plan as best known (entry 0) and under the same joint draws."""
        return [_draw(self.evaluator, plan, draws, metrics) for plan in plans]


class PoolWorkers:
    """Trials in worker processes, each with its own groundwork; a lost worker ends the run with one line."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def evaluate(self, plans: Sequence[Plan]) -> list[Outcome]:
        """Outcomes of the plans, in their order."""
        return self._map(_evaluate_here, plans)

    def settle(self, plans: Sequence[Plan]) -> list[Outcome]:
        """Outcomes of full runs, in their order."""
        return self._map(_settle_here, plans)

    def _map(self, function: Callable[[Plan], Outcome], plans: Sequence[Plan]) -> list[Outcome]:
        try:
            return list(self.pool.map(function, plans))
        except BrokenProcessPool:
            raise _lost_worker() from None

    def draw(self, plans: Sequence[Plan], draws: int, metrics: Sequence[str]) -> list[dict[str, NDArray[np.float64]]]:
        """Metrics of each plan as best known (entry 0) and under the same joint draws."""
        try:
            return list(self.pool.map(_draw_here, plans, [draws] * len(plans), [tuple(metrics)] * len(plans)))
        except BrokenProcessPool:
            raise _lost_worker() from None


def _lost_worker() -> MoesimError:
    return MoesimError("a worker process died", mend="run again with --resume, with fewer --workers if memory is short")


@contextmanager
def start_workers(scenario: Scenario, evaluator: Evaluator, count: int) -> Iterator[Workers]:
    """Workers for a run: this process for one, else a pool of spawned processes with one thread each."""
    if count <= 1:
        yield LocalWorkers(evaluator)
        return
    for name in _THREAD_SETTINGS:
        os.environ.setdefault(name, "1")
    with ProcessPoolExecutor(
        count, mp_context=get_context("spawn"), initializer=_start, initargs=(scenario, evaluator.first_look)
    ) as pool:
        yield PoolWorkers(pool)


_here: dict[str, Evaluator] = {}


def _start(scenario: Scenario, first_look: bool) -> None:
    _here["evaluator"] = Evaluator(groundwork(scenario), scenario, first_look=first_look)


def _evaluate_here(plan: Plan) -> Outcome:
    return _here["evaluator"].evaluate(plan)


def _settle_here(plan: Plan) -> Outcome:
    return _here["evaluator"].settle(plan)


def _draw_here(plan: Plan, draws: int, metrics: tuple[str, ...]) -> dict[str, NDArray[np.float64]]:
    return _draw(_here["evaluator"], plan, draws, metrics)


def _draw(evaluator: Evaluator, plan: Plan, draws: int, metrics: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    rows = drawn_metrics(evaluator.run(plan, draws=draws))
    return {metric: np.asarray([row[metric] for row in rows]) for metric in metrics}
