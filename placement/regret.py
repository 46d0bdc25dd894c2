"""How good a search is, where the whole space is known: its regret, and its share of the front's hypervolume.

`python -m placement.regret SCENARIO.yaml --table FILE.parquet` evaluates every legal plan once (where the file is not
there yet), then searches the table with several seeds. With `--large` the space is too large for that: the search is
set against random search and local search, from the same recipes, with as many evaluations and with as much CPU time.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import io
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from moesim.engine.deployment import Groundwork, groundwork
from moesim.errors import BadInput, Infeasible, MoesimError
from moesim.files import write_bytes
from moesim.spec.scenario import Scenario, load_scenario
from placement.executors import LocalWorkers
from placement.local_search import local_search
from placement.objective import Evaluator, Outcome
from placement.plans import Plan
from placement.space import Space, enumerate_space
from placement.surrogate import front_of, hypervolume, reference_of
from placement.tune_command import known_recipes
from placement.tuner import open_study, search

_FIGURES = ("status", "maximised", "minimised", "violation", "extrapolated_share")
SAMPLED_ROWS = 6
# How many times the evaluations of `auto` its rivals may have, if its CPU time lasts as long; and the least of that
# time, for evaluations that cost nothing.
LONGER = 5
LEAST_LIMIT_S = 0.05


@dataclass(frozen=True)
class Problem:
    """A scenario with its space and the plans that every search tries first."""

    ground: Groundwork
    scenario: Scenario
    space: Space
    recipes: tuple[Plan, ...]


@dataclass(frozen=True)
class Score:
    """One search. regret: share of the best kept objective that it misses. volume: its share of the hypervolume."""

    regret: float
    volume: float


def problem_of(path: Path) -> Problem:
    """The search problem of a scenario file. Raises MoesimError."""
    ground = groundwork(load_scenario(path))
    space = enumerate_space(ground, ground.scenario)
    return Problem(ground, ground.scenario, space, tuple(known_recipes(ground, ground.scenario, space)))


class Known:
    """Workers that look outcomes up in a table instead of simulating."""

    count = 1

    def __init__(self, table: dict[tuple[str, ...], Outcome]) -> None:
        self.table = table

    def evaluate(self, plans: Sequence[Plan]) -> Iterator[Outcome]:
        """Outcomes of the plans, in their order."""
        return (self.table[tuple(plan.params().values())] for plan in plans)

    def settle(self, plans: Sequence[Plan]) -> list[Outcome]:
        """The same outcomes: a table has one fidelity."""
        return list(self.evaluate(plans))

    def draw(self, plans: Sequence[Plan], draws: int, metrics: Sequence[str]) -> list[Any]:
        """Not there: a table has no draws."""
        raise NotImplementedError


class Spent(BaseException):
    """The CPU time of a search is used up; no Exception, so that nothing takes it for a plan that failed."""


class Remembering:
    """Workers that simulate each plan once, whoever asks, and charge its CPU time to everybody who asks.

    told: of each evaluation since `begin`, the CPU seconds charged by then and its outcome; past `limit_s` of them an
    evaluation raises Spent.
    """

    count = 1

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self.known: dict[Plan, tuple[Outcome, float]] = {}
        self.spent_s = 0.0
        self.begin()

    def begin(self, limit_s: float = math.inf) -> None:
        """A new search, with so much CPU time for all it does."""
        self.told: list[tuple[float, Outcome]] = []
        self.limit_s, self._charged_s = limit_s, 0.0
        self._began_s, self._spent_before_s = time.process_time(), self.spent_s

    @property
    def charged_s(self) -> float:
        """CPU seconds of the search: of its evaluations, whoever paid them, and of everything else it did."""
        beside = time.process_time() - self._began_s - (self.spent_s - self._spent_before_s)
        return self._charged_s + beside

    def evaluate(self, plans: Sequence[Plan]) -> Iterator[Outcome]:
        """Outcomes of the plans, in their order, as they come. Raises Spent."""
        for plan in plans:
            if self.charged_s > self.limit_s:
                raise Spent
            if plan not in self.known:
                started = time.process_time()
                outcome = self.evaluator.evaluate(plan)
                cost = time.process_time() - started
                self.spent_s += cost
                self.known[plan] = (outcome, cost)
            outcome, cost = self.known[plan]
            self._charged_s += cost
            self.told.append((self.charged_s, outcome))
            yield outcome

    def settle(self, plans: Sequence[Plan]) -> list[Outcome]:
        """Outcomes of full runs, in their order."""
        return [self.evaluator.settle(plan) for plan in plans]

    def draw(self, plans: Sequence[Plan], draws: int, metrics: Sequence[str]) -> list[Any]:
        """Metrics of each plan under joint draws."""
        return LocalWorkers(self.evaluator).draw(plans, draws, metrics)


def make_table(problem: Problem, path: Path) -> None:
    """Evaluate every legal plan by a first look and write the table: choices, and the figures that a search sees."""
    evaluator = Evaluator(problem.ground, problem.scenario, first_look=True)
    rows = [plan.params() | figures(evaluator.evaluate(plan)) for plan in problem.space.plans]
    buffer = io.BytesIO()
    pl.DataFrame(rows).write_parquet(buffer, compression="zstd")
    write_bytes(path, buffer.getvalue())


def figures(outcome: Outcome) -> dict[str, Any]:
    """The row of an outcome."""
    up, down = outcome.goals() if outcome.status == "ok" else (float("nan"), float("nan"))
    share = outcome.metrics.get("extrapolated_share", 0.0)
    return dict(zip(_FIGURES, (outcome.status, up, down, outcome.violation, share), strict=True))


def read_table(path: Path, space: Space) -> dict[tuple[str, ...], Outcome]:
    """The outcomes of a table by the choices of their plans. Raises BadInput where its plans are not the space's."""
    table = {}
    for row in pl.read_parquet(path).iter_rows(named=True):
        share = {"extrapolated_share": row["extrapolated_share"]}
        outcome = Outcome(row["status"], share, row["violation"], aims=(row["maximised"], row["minimised"]))
        table[tuple(row[name] for name in row if name not in _FIGURES)] = outcome
    if set(table) != {tuple(plan.params().values()) for plan in space.plans}:
        raise BadInput("the table is of another space", where=str(path), mend="delete it, to have it made again")
    return table


def stale_rows(problem: Problem, table: dict[tuple[str, ...], Outcome], rows: int = SAMPLED_ROWS) -> list[str]:
    """Of some rows, spread over the table, the plans that the model prices differently by now.

    By over 0.01 %; under `robust`, by over 1 %.
    """
    evaluator = Evaluator(problem.ground, problem.scenario, first_look=True)
    plans = problem.space.plans
    found = []
    for index in np.linspace(0, len(plans) - 1, rows).round().astype(int):
        plan = plans[index]
        told, now = figures(table[tuple(plan.params().values())]), figures(evaluator.evaluate(plan))
        # Annealing rounds otherwise on another kind of processor, and may end in another placement of like balance.
        solvers = [plan.solver, *(pool.solver for pool in plan.pools.values())]
        close = 1e-2 if any(one.startswith("robust") for one in solvers) else 1e-4
        same = told["status"] == now["status"] and all(
            np.isclose(told[name], now[name], rtol=close, atol=1e-2 * close, equal_nan=True) for name in _FIGURES[1:]
        )
        if not same:
            found.append(plan.label())
    return found


def scores(
    problem: Problem, table: dict[tuple[str, ...], Outcome], sampler: str, trials: int, seeds: Sequence[int]
) -> list[Score]:
    """Searches of so many trials on a table, one for each seed. Raises Infeasible where no plan may be recommended."""
    best = max((outcome.goals()[0] for outcome in table.values() if outcome.recommendable), default=None)
    if best is None:
        raise Infeasible(
            f"none of {len(table)} plans meets the service levels inside the profile, so that there is no best to miss",
            where="objective.slo",
            mend="loosen the levels",
            reason="no_plan_meets_the_levels",
        )
    goals = np.array([outcome.goals() for outcome in table.values() if outcome.status == "ok"])
    reference = reference_of(goals[front_of(goals)])
    whole = hypervolume(goals, reference)
    found = []
    for seed in seeds:
        tried = list(_searched(problem, Known(table), sampler, trials, seed).values())
        reached = max((outcome.goals()[0] for outcome in tried if outcome.recommendable), default=0.0)
        points = np.array([outcome.goals() for outcome in tried if outcome.status == "ok"])
        found.append(Score(1.0 - reached / best, hypervolume(points, reference) / whole))
    return found


def _searched(problem: Problem, workers: Any, sampler: str, trials: int, seed: int) -> dict[Plan, Outcome]:
    chosen = problem.scenario.search.model_copy(update={"sampler": sampler})
    scenario = problem.scenario.model_copy(update={"seed": seed, "search": chosen})
    study = open_study(scenario, None, None, False)
    found = search(study, problem.space, scenario, workers, trials=trials, recipes=problem.recipes)
    return {trial.plan: trial.outcome for trial in found.trials}


@dataclass(frozen=True)
class Ran:
    """One search: of each evaluation the CPU seconds charged by then, and the best objective kept by then."""

    charged_s: tuple[float, ...]
    best: tuple[float, ...]

    def after(self, *, evaluations: int | None = None, cpu_s: float = math.inf) -> float:
        """The best kept objective after some evaluations, or some CPU seconds; 0 where nothing was kept."""
        count = len(self.best) if evaluations is None else min(evaluations, len(self.best))
        count = min(count, bisect.bisect_right(self.charged_s, cpu_s))
        return self.best[count - 1] if count else 0.0


METHODS = ("auto", "random", "local")


def contest(problem: Problem, trials: int, seed: int, workers: Remembering) -> dict[str, Ran]:
    """`auto` with so many evaluations; `random` and `local` with as many and on, until its CPU time is used up."""
    found: dict[str, Ran] = {}
    most, limit_s = trials, math.inf
    for name in METHODS:
        workers.begin(limit_s)
        with contextlib.suppress(Spent):
            if name == "local":
                rng = np.random.default_rng([seed, 11])
                local_search(problem.space, problem.recipes, workers.evaluate, most, rng)
            else:
                _searched(problem, workers, name, most, seed)
        best, so_far = [], 0.0
        for _, outcome in workers.told:
            so_far = max(so_far, outcome.goals()[0] if outcome.recommendable else 0.0)
            best.append(so_far)
        found[name] = Ran(tuple(charged for charged, _ in workers.told), tuple(best))
        if name == "auto":
            limit_s, most = max(workers.charged_s, LEAST_LIMIT_S), LONGER * trials
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The study from the command line; prints one line for each sampler or method."""
    parser = argparse.ArgumentParser(prog="python -m placement.regret", description=__doc__)
    parser.add_argument("scenario", type=Path)
    parser.add_argument("--table", type=Path, help="every plan of the space, made where it is not there")
    parser.add_argument("--samplers", default="auto,tpe,random")
    parser.add_argument("--share", type=float, default=0.1, help="of the space that is evaluated")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--large", type=int, metavar="TRIALS", help="against random and local search, without a table")
    asked = parser.parse_args(arguments)
    try:
        problem = problem_of(asked.scenario)
        if asked.large is not None:
            _print_contest(problem, asked.large, range(asked.seeds))
            return 0
        path = asked.table or asked.scenario.with_suffix(".parquet")
        if not path.exists():
            make_table(problem, path)
        table = read_table(path, problem.space)
        if stale := stale_rows(problem, table):
            raise BadInput(f"the table is of an older model: {stale[0]}", where=str(path), mend="delete it")
        trials = int(asked.share * problem.space.size)
        print(f"{problem.space.size} legal plans, {trials} evaluated, {len(problem.recipes)} recipes among them")
        for sampler in asked.samplers.split(","):
            started = time.process_time()
            got = scores(problem, table, sampler, trials, range(asked.seeds))
            regret, volume = (np.array([getattr(one, name) for one in got]) for name in ("regret", "volume"))
            print(
                f"{sampler}: regret median {np.median(regret):.2%}, worst {regret.max():.2%}; hypervolume median "
                f"{np.median(volume):.2%}, worst {volume.min():.2%}; {(time.process_time() - started) / len(got):.1f} "
                "CPU s a search beside the evaluations"
            )
    except MoesimError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    return 0


def _print_contest(problem: Problem, trials: int, seeds: Sequence[int]) -> None:
    about = "about " if problem.space.estimated else ""
    print(f"{about}{problem.space.size} legal plans, {trials} evaluated by auto", flush=True)
    workers = Remembering(Evaluator(problem.ground, problem.scenario, first_look=True))
    views = ("evaluations", "CPU time")
    total: dict[str, dict[str, list[float]]] = {view: {name: [] for name in METHODS} for view in views}
    for seed in seeds:
        ran = contest(problem, trials, seed, workers)
        spent = ran["auto"].charged_s[-1]
        for name, one in ran.items():
            total["evaluations"][name].append(one.after(evaluations=trials))
            total["CPU time"][name].append(one.after(cpu_s=spent))
        told = ", ".join(
            f"{name} {total['evaluations'][name][-1]:.2f} and {total['CPU time'][name][-1]:.2f} "
            f"({bisect.bisect_right(one.charged_s, spent)} evaluations)"
            for name, one in ran.items()
        )
        print(f"seed {seed}, {spent:.1f} CPU s: with as many evaluations and with as much CPU time {told}", flush=True)
    for view, by_name in total.items():
        for name, reached in by_name.items():
            print(
                f"equal {view}: {name}: mean {np.mean(reached):.2f}, median {np.median(reached):.2f}, "
                f"worst {min(reached):.2f}, best {max(reached):.2f}"
            )


if __name__ == "__main__":
    sys.exit(main())
