"""Where trials run: in this process, or in a pool of worker processes; outcomes come back in the order asked."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from moesim.engine.deployment import groundwork
from moesim.errors import MoesimError
from moesim.spec.scenario import Scenario
from placement.objective import Evaluator, Outcome, drawn_metrics
from placement.plans import Plan

THREAD_SETTINGS = (
    "OMP_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "POLARS_MAX_THREADS",
)
# A pool is started anew so often for one call; a plan that keeps killing its worker ends the run.
_RESTARTS = 3
_Found = TypeVar("_Found")
Drawn = dict[str, NDArray[np.float64]]


class Workers(Protocol):
    """Evaluates batches of plans. count: plans that it takes at a time."""

    count: int

    def evaluate(self, plans: Sequence[Plan]) -> Iterator[Outcome]:
        """Outcomes of the plans, in their order, as they come."""
        ...

    def settle(self, plans: Sequence[Plan]) -> list[Outcome]:
        """Outcomes of full runs, where `evaluate` only takes a first look."""
        ...

    def draw(self, plans: Sequence[Plan], draws: int, metrics: Sequence[str]) -> list[Drawn]:
        """Metrics of each plan as best known (entry 0) and under the same joint draws.

        Where a draw leaves the profile there is entry 0 alone.
        """
        ...


class LocalWorkers:
    """All trials in this process."""

    count = 1

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator

    def evaluate(self, plans: Sequence[Plan]) -> Iterator[Outcome]:
        """Outcomes of the plans, in their order, as they come."""
        return (self.evaluator.evaluate(plan) for plan in plans)

    def settle(self, plans: Sequence[Plan]) -> list[Outcome]:
        """Outcomes of full runs, in their order."""
        return [self.evaluator.settle(plan) for plan in plans]

    def draw(self, plans: Sequence[Plan], draws: int, metrics: Sequence[str]) -> list[Drawn]:
        """Metrics of each plan as best known (entry 0) and under the same joint draws."""
        return [draw(self.evaluator, plan, draws, metrics) for plan in plans]


class PoolWorkers:
    """Trials in worker processes, each with its own groundwork; what a lost worker had in hand is done again."""

    def __init__(self, start: Callable[[], ProcessPoolExecutor], count: int) -> None:
        self.start = start
        self.count = count
        self.pool = start()

    def evaluate(self, plans: Sequence[Plan]) -> Iterator[Outcome]:
        """Outcomes of the plans, in their order, as they come."""
        return self._map(_evaluate_here, [(plan,) for plan in plans])

    def settle(self, plans: Sequence[Plan]) -> list[Outcome]:
        """Outcomes of full runs, in their order."""
        return list(self._map(_settle_here, [(plan,) for plan in plans]))

    def draw(self, plans: Sequence[Plan], draws: int, metrics: Sequence[str]) -> list[Drawn]:
        """Metrics of each plan as best known (entry 0) and under the same joint draws."""
        return list(self._map(_draw_here, [(plan, draws, tuple(metrics)) for plan in plans]))

    def _map(self, function: Callable[..., _Found], arguments: Sequence[tuple[Any, ...]]) -> Iterator[_Found]:
        left, losses = list(arguments), 0
        waiting: list[Future[_Found]] = []
        try:
            while left:
                try:
                    waiting = self._submit(function, left)
                    for future in list(waiting):
                        found = future.result()
                        left.pop(0)
                        yield found
                except BrokenProcessPool:
                    losses += 1
                    if losses > _RESTARTS:
                        raise MoesimError(
                            "worker processes keep dying",
                            mend="go on with --resume and fewer --workers: is memory short?",
                        ) from None
                    self.pool.shutdown()
                    self.pool = self.start()
        finally:
            for future in waiting:
                future.cancel()

    def _submit(self, function: Callable[..., _Found], arguments: Sequence[tuple[Any, ...]]) -> list[Future[_Found]]:
        # Workers start with the first calls, and with what this thread blocks: Ctrl-C is for this process alone.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return [self.pool.submit(function, *one) for one in arguments]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def close(self) -> None:
        """End the workers."""
        self.pool.shutdown(cancel_futures=True)


@contextmanager
def start_workers(scenario: Scenario, evaluator: Evaluator, count: int, ray: str | None = None) -> Iterator[Workers]:
    """Workers for a run: a Ray cluster's, else this process for one, or a pool of spawned processes; one thread each.

    Raises MissingPart without Ray, BadInput where no cluster answers.
    """
    if ray is not None:
        from placement.ray_workers import ray_workers

        with ray_workers(ray, scenario, first_look=evaluator.first_look, count=count) as workers:
            yield workers
        return
    if count <= 1:
        yield LocalWorkers(evaluator)
        return
    for name in THREAD_SETTINGS:
        os.environ.setdefault(name, "1")
    pool = PoolWorkers(
        lambda: ProcessPoolExecutor(
            count, mp_context=get_context("spawn"), initializer=_start, initargs=(scenario, evaluator.first_look)
        ),
        count,
    )
    try:
        yield pool
    finally:
        pool.close()


_here: dict[str, Evaluator] = {}


def _start(scenario: Scenario, first_look: bool) -> None:
    _here["evaluator"] = Evaluator(groundwork(scenario), scenario, first_look=first_look)


def _evaluate_here(plan: Plan) -> Outcome:
    return _here["evaluator"].evaluate(plan)


def _settle_here(plan: Plan) -> Outcome:
    return _here["evaluator"].settle(plan)


def _draw_here(plan: Plan, draws: int, metrics: tuple[str, ...]) -> Drawn:
    return draw(_here["evaluator"], plan, draws, metrics)


def draw(evaluator: Evaluator, plan: Plan, draws: int, metrics: Sequence[str]) -> Drawn:
    """Metrics of a plan as best known (entry 0) and under joint draws."""
    rows = drawn_metrics(evaluator.run(plan, draws=draws))
    return {metric: np.asarray([row[metric] for row in rows]) for metric in metrics}
