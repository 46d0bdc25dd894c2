"""`auto` against random and local search in spaces too large to know whole: `python -m placement.regret --large`.

Every search begins with the same recipes, on groundwork of its own, and pays for all it does: its evaluations, with the
placements and prices that they need worked out again, and everything beside them. `auto` has so many evaluations; its
rivals have as many, and go on until its CPU time is used up.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from placement.local_search import local_search
from placement.objective import Evaluator, Outcome
from placement.plans import Plan
from placement.search_problem import Problem, searched

METHODS = ("auto", "random", "local")
# How many times the evaluations of `auto` its rivals may have, if its CPU time lasts as long; and the least of that
# time, for evaluations that cost nothing.
LONGER = 5
LEAST_LIMIT_S = 0.05
# A search is there when it is this close to the best plan that any of them found.
CLOSE = 0.005
LEVEL = 0.9


class Evaluates(Protocol):
    """Whoever prices a plan."""

    def evaluate(self, plan: Plan) -> Outcome:
        """The outcome of a plan."""


class Spent(BaseException):
    """The CPU time of a search is used up; no Exception, so that nothing takes it for a plan that failed."""


class Paying:
    """Workers of one search. told: of each evaluation, the CPU seconds of the search by then, and its outcome.

    Past `limit_s` CPU seconds and `least` evaluations the next one raises Spent.
    """

    count = 1

    def __init__(self, evaluator: Evaluates, least: int = 0, limit_s: float = math.inf) -> None:
        self.evaluator, self.least, self.limit_s = evaluator, least, limit_s
        self.told: list[tuple[float, Outcome]] = []
        self._began_s = time.process_time()

    @property
    def charged_s(self) -> float:
        """CPU seconds of all that the search did."""
        return time.process_time() - self._began_s

    def evaluate(self, plans: Sequence[Plan]) -> Iterator[Outcome]:
        """Outcomes of the plans, in their order, as they come. Raises Spent."""
        for plan in plans:
            if self.charged_s > self.limit_s and len(self.told) >= self.least:
                raise Spent
            outcome = self.evaluator.evaluate(plan)
            self.told.append((self.charged_s, outcome))
            yield outcome

    def settle(self, plans: Sequence[Plan]) -> list[Outcome]:
        """Not there: a contest is about what a search finds."""
        raise NotImplementedError

    def draw(self, plans: Sequence[Plan], draws: int, metrics: Sequence[str]) -> list[Any]:
        """Not there either."""
        raise NotImplementedError


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

    def reached_s(self, objective: float) -> float:
        """CPU seconds until the best kept objective was at least so high; infinity where it never was."""
        return next((s for s, best in zip(self.charged_s, self.best, strict=True) if best >= objective), math.inf)


def evaluator_of(problem: Problem) -> Evaluates:
    """Who prices the plans of a real scenario: first looks."""
    return Evaluator(problem.ground, problem.scenario, first_look=True)


def contest(
    problem: Problem, trials: int, seed: int, evaluator: Callable[[Problem], Evaluates] = evaluator_of
) -> dict[str, Ran]:
    """`auto` with so many evaluations; `random` and `local` with as many and on, until its CPU time is used up."""
    found: dict[str, Ran] = {}
    most, least, limit_s = trials, 0, math.inf
    for name in METHODS:
        own = problem.afresh()
        pays = evaluator(own)
        workers = Paying(pays, least, limit_s)
        with contextlib.suppress(Spent):
            rng = np.random.default_rng([seed, 11])
            if name == "auto":
                searched(own, workers, name, most, seed)
            elif name == "local":
                local_search(own.space, own.recipes, workers.evaluate, most, rng)
            else:
                random_search(own, workers, most, rng)
        best, so_far = [], 0.0
        for _, outcome in workers.told:
            so_far = max(so_far, outcome.goals()[0] if outcome.recommendable else 0.0)
            best.append(so_far)
        found[name] = Ran(tuple(charged for charged, _ in workers.told), tuple(best))
        if name == "auto":
            limit_s, least, most = max(workers.charged_s, LEAST_LIMIT_S), trials, LONGER * trials
    return found


def random_search(problem: Problem, workers: Paying, trials: int, rng: np.random.Generator) -> None:
    """Evaluate the recipes, then legal plans at random."""
    tried = dict.fromkeys(problem.recipes[:trials])
    for _ in workers.evaluate(list(tried)):
        pass
    while len(tried) < trials and (fresh := problem.space.untried(tried.keys(), 1, rng)):
        tried[fresh[0]] = None
        for _ in workers.evaluate(fresh):
            pass


def paired(mine: ArrayLike, theirs: ArrayLike) -> tuple[float, float, float]:
    """Mean of the paired differences and its interval (90 %, Student's t)."""
    differences = np.subtract(mine, theirs)
    mean = float(differences.mean())
    if len(differences) < 2:
        return mean, -math.inf, math.inf
    half = float(stdtrit(len(differences) - 1, 0.5 + LEVEL / 2) * differences.std(ddof=1) / math.sqrt(len(differences)))
    return mean, mean - half, mean + half


def word(low: float, high: float) -> str:
    """What an interval of a gain says."""
    return "ahead" if low > 0.0 else "behind" if high < 0.0 else "level"


def verdicts(ran: Sequence[dict[str, Ran]], trials: int) -> list[str]:
    """What searches of several seeds say, a line each: what was reached, how soon, and whether `auto` is ahead.

    With as much CPU time: until the last evaluation of `auto` with the same seed. How soon: within 0.5 % of the best
    kept objective of any search here; one that does not get there counts with all of its time.
    """
    limits = [one["auto"].charged_s[-1] for one in ran]
    views = {
        "as many evaluations": {name: [one[name].after(evaluations=trials) for one in ran] for name in METHODS},
        "as much CPU time": {
            name: [one[name].after(cpu_s=limit) for one, limit in zip(ran, limits, strict=True)] for name in METHODS
        },
    }
    lines = []
    for view, reached in views.items():
        for name, values in reached.items():
            lines.append(
                f"{view}: {name}: mean {np.mean(values):.2f}, median {np.median(values):.2f}, "
                f"worst {min(values):.2f}, best {max(values):.2f}"
            )
    best = max(max(values) for reached in views.values() for values in reached.values())
    there = {name: [one[name].reached_s((1.0 - CLOSE) * best) for one in ran] for name in METHODS}
    soon = {name: np.minimum(times, limits) for name, times in there.items()}
    for name, times in soon.items():
        count = sum(one <= limit for one, limit in zip(there[name], limits, strict=True))
        lines.append(
            f"within {CLOSE:.1%} of {best:.2f}: {name}: {count} of {len(ran)} seeds, CPU seconds median "
            f"{np.median(times):.2f}, mean {np.mean(times):.2f}"
        )
    for rival in METHODS[1:]:
        for view, reached in views.items():
            lines.append(_told(f"{view}, against {rival}", *paired(reached["auto"], reached[rival])))
        lines.append(_told(f"CPU seconds to get there saved, against {rival}", *paired(soon[rival], soon["auto"])))
    return lines


def _told(what: str, mean: float, low: float, high: float) -> str:
    return f"{what}: auto is {word(low, high)}: {mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def print_contest(problem: Problem, trials: int, seeds: Sequence[int]) -> None:
    """A contest for each seed, as they end, and the verdicts."""
    about = "about " if problem.space.estimated else ""
    print(f"{about}{problem.space.size} legal plans, {trials} evaluated by auto", flush=True)
    # What is compiled or read once in a process, no search pays.
    warm = problem.afresh()
    for _ in Paying(evaluator_of(warm)).evaluate(warm.recipes + warm.space.plans[:8]):
        pass
    ran = []
    for seed in seeds:
        one = contest(problem, trials, seed)
        ran.append(one)
        limit_s = one["auto"].charged_s[-1]
        told = ", ".join(
            f"{name} {each.after(evaluations=trials):.2f} and {each.after(cpu_s=limit_s):.2f} "
            f"({bisect.bisect_right(each.charged_s, limit_s)} evaluations)"
            for name, each in one.items()
        )
        print(f"seed {seed}, {limit_s:.1f} CPU s: with as many evaluations and as much CPU time {told}", flush=True)
    for line in verdicts(ran, trials):
        print(line)
