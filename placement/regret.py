"""How good a search is, where the whole space is known: its regret, and its share of the front's hypervolume.

`python -m placement.regret SCENARIO.yaml --table FILE.parquet` evaluates every legal plan once (where the file is not
there yet), then searches the table with several seeds. With `--large` the space is too large for that: the search is
set against random search and local search, from the same recipes, with as many evaluations and with as much CPU time.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from moesim.errors import BadInput, Infeasible, MoesimError
from moesim.files import write_bytes
from placement.contest import print_contest
from placement.objective import Evaluator, Outcome
from placement.plans import Plan
from placement.search_problem import Problem, problem_of, searched
from placement.space import Space
from placement.surrogate import front_of, hypervolume, reference_of

_FIGURES = ("status", "maximised", "minimised", "violation", "extrapolated_share")
SAMPLED_ROWS = 6


@dataclass(frozen=True)
class Score:
    """One search. regret: share of the best kept objective that it misses. volume: its share of the hypervolume."""

    regret: float
    volume: float


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
        tried = list(searched(problem, Known(table), sampler, trials, seed).values())
        reached = max((outcome.goals()[0] for outcome in tried if outcome.recommendable), default=0.0)
        points = np.array([outcome.goals() for outcome in tried if outcome.status == "ok"])
        found.append(Score(1.0 - reached / best, hypervolume(points, reference) / whole))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The study from the command line; prints one line for each sampler or method."""
    parser = argparse.ArgumentParser(prog="python -m placement.regret", description=__doc__)
    parser.add_argument("scenario", type=Path)
    parser.add_argument("--table", type=Path, help="every plan of the space, made where it is not there")
    parser.add_argument("--samplers", default="auto,tpe,random")
    parser.add_argument("--share", type=float, default=0.1, help="of the space that is evaluated")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--large", type=int, metavar="TRIALS", help="against random and local search, without a table")
    asked = parser.parse_args(arguments)
    seeds = range(asked.first_seed, asked.first_seed + asked.seeds)
    try:
        problem = problem_of(asked.scenario)
        if asked.large is not None:
            print_contest(problem, asked.large, seeds)
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
            got = scores(problem, table, sampler, trials, seeds)
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


if __name__ == "__main__":
    sys.exit(main())
