"""How good the search is: on spaces known whole, against random and local search, and its parts by hand."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.cli import run
from moesim.errors import Infeasible
from placement.contest import METHODS, Paying, Ran, Spent, contest, paired, verdicts, word
from placement.local_search import local_search
from placement.objective import Evaluator, Outcome
from placement.outlay import Outlay
from placement.plans import Plan
from placement.regret import main, read_table, scores, stale_rows
from placement.search_problem import Problem, problem_of, searched
from placement.surrogate import OFTEN_UNTIL, Surrogate, front_of, gained, hypervolume, reference_of, worth
from tests.scenarios import small, write

FOLDER = Path(__file__).parents[1] / "data" / "regret"
SEEDS = range(10)
FEW = SEEDS if os.environ.get("MOESIM_WHOLE") else range(4)


@pytest.fixture(scope="module", params=["deepseek_v3", "qwen3_235b"])
def known(request: Any) -> tuple[Problem, dict[tuple[str, ...], Outcome]]:
    problem = problem_of(FOLDER / f"{request.param}.yaml")
    return problem, read_table(FOLDER / f"{request.param}.parquet", problem.space)


def test_regret_and_hypervolume_on_spaces_known_whole(known: tuple[Problem, dict[tuple[str, ...], Outcome]]) -> None:
    problem, table = known
    assert problem.space.size >= 2000
    got = scores(problem, table, "auto", problem.space.size // 10, FEW)
    regret, volume = [one.regret for one in got], [one.volume for one in got]
    print(f"\nregret median {np.median(regret):.2%}, worst {max(regret):.2%}; hypervolume {np.median(volume):.2%}")
    assert np.median(regret) <= 0.01
    assert max(regret) <= 0.03
    assert np.median(volume) >= 0.98


def test_a_space_in_which_no_plan_keeps_the_levels_has_no_regret(
    known: tuple[Problem, dict[tuple[str, ...], Outcome]],
) -> None:
    problem, table = known
    missed = {key: replace(outcome, violation=1.0) for key, outcome in table.items()}
    with pytest.raises(Infeasible, match="meets the service levels"):
        scores(problem, missed, "auto", 16, [0])


def test_the_tables_are_of_the_model_as_it_is(known: tuple[Problem, dict[tuple[str, ...], Outcome]]) -> None:
    """When this fails the model has changed: make the tables again with `python -m placement.regret`."""
    assert stale_rows(*known, rows=4) == []


@pytest.mark.skipif(not os.environ.get("MOESIM_WHOLE"), reason="some CPU minutes: MOESIM_WHOLE=1")
@pytest.mark.parametrize("name", ["tight", "wide_deepseek_v3", "wide_qwen3_235b"])
def test_better_than_random_and_local_search_in_a_large_space(name: str) -> None:
    """As many evaluations each, and as much CPU time."""
    problem = problem_of(FOLDER / f"{name}.yaml")
    assert problem.space.size >= 1e6
    ran = [contest(problem, 120, seed) for seed in SEEDS]
    told = verdicts(ran, 120)
    print("", *told, sep="\n")
    assert not [line for line in told if "is behind" in line]
    assert all("ahead" in line for line in told if line.startswith("as much CPU time, against random"))


class InRuns(Paying):
    """Workers that charge what an evaluation takes in runs: the same figures on any machine. Outcomes are shared."""

    known: ClassVar[dict[Plan, Outcome]] = {}

    def __init__(self, problem: Problem, limit: float = np.inf) -> None:
        super().__init__(Evaluator(problem.ground, problem.scenario, first_look=True))
        self.outlay, self.rows = Outlay(problem.space), problem.space.grid.rows
        self.runs, self.limit = 0.0, limit
        self.tried: list[Plan] = []

    def evaluate(self, plans: Sequence[Plan]) -> Iterator[Outcome]:
        for plan in plans:
            if self.runs > self.limit:
                raise Spent
            self.runs += float(self.outlay.runs(self.rows([plan]), self.tried)[0])
            self.tried.append(plan)
            if plan not in self.known:
                self.known[plan] = self.evaluator.evaluate(plan)
            outcome = self.known[plan]
            self.told.append((self.runs, outcome))
            yield outcome


def best_of(workers: Paying) -> float:
    return max(outcome.goals()[0] for _, outcome in workers.told if outcome.recommendable)


def test_the_default_sampler_keeps_its_place_against_local_search() -> None:
    """Two of the seeds above, half of the evaluations, and what they take counted instead of measured: some CPU seconds
    of simulation, as made-up prices show no cost of solving and pricing."""
    problem = problem_of(FOLDER / "tight.yaml")
    mine, theirs = [], []
    for seed in range(2):
        auto = InRuns(problem)
        searched(problem, auto, "auto", 60, seed)
        local = InRuns(problem, auto.runs)
        with contextlib.suppress(Spent):
            local_search(problem.space, problem.recipes, local.evaluate, 600, np.random.default_rng([seed, 11]))
        mine.append(best_of(auto))
        theirs.append(best_of(local))
    print(f"\nauto {mine}, local search {theirs}")
    assert np.mean(mine) >= np.mean(theirs)
    assert min(mine) >= 0.995 * 463.36  # the best that any search found in this space: docs/how-to/tune.md


def reached_by(ran: list[dict[str, Ran]], of: Callable[[Ran, Ran], float]) -> dict[str, list[float]]:
    """What each method reached, by seed."""
    return {name: [of(one[name], one["auto"]) for one in ran] for name in METHODS}


def test_a_search_is_charged_for_all_it_does_and_ends_when_its_time_is_up() -> None:
    class Slow:
        def evaluate(self, plan: Any) -> Any:
            until = time.process_time() + 0.02
            while time.process_time() < until:
                pass
            return plan

    workers = Paying(Slow(), limit_s=0.05)
    with pytest.raises(Spent):
        list(workers.evaluate(["a", "b", "c", "d", "e"]))  # type: ignore[list-item]
    assert [one for _, one in workers.told][:2] == ["a", "b"]
    assert len(workers.told) < 5
    assert [charged >= 0.02 * (at + 1) for at, (charged, _) in enumerate(workers.told)] == [True] * len(workers.told)
    # Whatever the time: as many evaluations as its rival.
    workers = Paying(Slow(), least=3, limit_s=0.0)
    with pytest.raises(Spent):
        list(workers.evaluate(["a", "b", "c", "d"]))  # type: ignore[list-item]
    assert len(workers.told) == 3


def test_no_search_of_a_contest_lives_on_the_work_of_another(large: Problem) -> None:
    begun = []

    def evaluator(problem: Problem) -> Any:
        begun.append(problem)
        return Priced()

    contest(large, 24, 0, evaluator)
    assert len(begun) == len(METHODS)
    assert len({id(one.ground) for one in begun} | {id(large.ground)}) == len(METHODS) + 1
    assert len({id(one.space.grid) for one in begun}) == len(METHODS)


def test_verdicts_are_of_paired_differences() -> None:
    mean, low, high = paired([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])
    half = (
        2.919986 * 1.0 / np.sqrt(3.0)
    )  # Student's t at 0.95 with 2 degrees of freedom; the differences' deviation is 1
    assert (mean, low, high) == pytest.approx((2.0, 2.0 - half, 2.0 + half), rel=1e-6)
    assert [word(0.1, 0.2), word(-0.2, -0.1), word(-0.1, 0.1), word(0.0, 0.0)] == ["ahead", "behind", "level", "level"]
    assert paired([1.0], [0.0])[1:] == (-np.inf, np.inf)  # one seed says nothing


def test_a_search_that_never_gets_there_counts_with_all_its_time() -> None:
    auto = Ran((1.0, 2.0, 3.0), (0.0, 0.0, 100.0))
    random, local = Ran((1.0, 4.0), (50.0, 99.9)), Ran((1.0, 2.0, 3.5), (90.0, 99.6, 99.9))
    told = verdicts([{"auto": auto, "random": random, "local": local}] * 2, 3)
    assert "as much CPU time: random: mean 50.00, median 50.00, worst 50.00, best 50.00" in told
    assert "within 0.5% of 100.00: auto: 2 of 2 seeds, CPU seconds median 3.00, mean 3.00" in told
    assert "within 0.5% of 100.00: random: 0 of 2 seeds, CPU seconds median 3.00, mean 3.00" in told
    assert "within 0.5% of 100.00: local: 2 of 2 seeds, CPU seconds median 2.00, mean 2.00" in told
    assert "as much CPU time, against random: auto is ahead: +50.00 [+50.00, +50.00]" in told
    assert "CPU seconds to get there saved, against local: auto is behind: -1.00 [-1.00, -1.00]" in told


def test_what_a_search_had_reached_by_then() -> None:
    ran = Ran((1.0, 2.0, 4.0), (0.0, 5.0, 7.0))
    assert ran.after(evaluations=2) == 5.0
    assert ran.after(cpu_s=3.9) == 5.0
    assert ran.after(cpu_s=0.5) == 0.0
    assert ran.after(evaluations=9, cpu_s=9.0) == 7.0


def priced(plan: Plan) -> Outcome:
    """A made-up price: choices that help only together, a level, and a cost that knows no order."""
    sizes, options = plan.parallel, dict(plan.options)
    tokens, running = float(str(options[TOKENS])), float(str(options[RUNNING]))
    fit = -((np.log2(tokens / 3000.0)) ** 2) - (np.log2(running * sizes.attention_dp / 500.0)) ** 2
    fit -= 0.5 * (np.log2(sizes.tp * 2.0 / sizes.ep)) ** 2 - 0.3 * (plan.solver == "robust") * (sizes.ep > 2)
    throughput = 100.0 * float(np.exp(0.1 * fit))
    tpot = 0.02 * (running / 64.0) ** 0.5 * (1.0 + 1.0 / sizes.tp)
    return Outcome("ok", {"extrapolated_share": 0.0}, tpot / 0.05 - 1.0, aims=(throughput, tpot))


TOKENS = "serving.batching.max_batch_tokens_per_dp_rank"
RUNNING = "serving.batching.max_running_requests_per_dp_rank"


class Priced:
    """An evaluator of a made-up price."""

    def evaluate(self, plan: Any) -> Any:
        return priced(plan)


@pytest.fixture
def large(tmp_path: Path) -> Problem:
    """A space of over a million plans, none of them simulated."""
    axes = {
        TOKENS: [int(one) for one in np.geomspace(1024, 30000, 40)],
        RUNNING: [int(one) for one in np.geomspace(8, 900, 40)],
        "serving.memory.fraction": [0.8, 0.85, 0.88, 0.92],
    }
    problem = problem_of(write(tmp_path, small(search={"axes": axes, "schedules": ["sequential", "two_batch"]})))
    assert problem.space.size >= 1e6
    return problem


def beaten(reached: dict[str, list[float]]) -> None:
    told = {name: (float(np.median(values)), min(values)) for name, values in reached.items()}
    print(f"\nbest kept objective, median and worst of the seeds: {told}")
    assert told["auto"][0] > told["random"][0]
    assert told["auto"][0] > told["local"][0]
    assert told["auto"][1] >= max(told["random"][1], told["local"][1])


def test_better_than_random_and_local_search_on_a_made_up_price(large: Problem) -> None:
    """Without simulating: the real prices are in the test above."""
    ran = [contest(large, 120, seed, lambda problem: Priced()) for seed in FEW]
    beaten(reached_by(ran, lambda one, auto: one.after(evaluations=120)))


def test_local_search_tries_each_plan_once(large: Problem) -> None:
    tried = local_search(large.space, large.recipes, lambda plans: map(priced, plans), 60, np.random.default_rng(0))
    assert len(tried) == 60
    assert all(plan in large.space for plan in tried)
    for plan in large.space.grid.neighbours(large.recipes[0])[:50]:
        mine, theirs = large.recipes[0].params(), plan.params()
        assert sum(mine[name] != theirs[name] for name in mine) == 1


def test_length_scales_are_fitted_where_all_early_trials_failed(large: Problem) -> None:
    plans = large.space.plans[: OFTEN_UNTIL + 4]
    told = [
        (plan, Outcome("out_of_memory") if place < OFTEN_UNTIL else priced(plan)) for place, plan in enumerate(plans)
    ]
    found = Surrogate(large.space).propose(told, 4, set(plans), np.random.default_rng(0))
    assert len(found) == 4


def test_proposals_are_new_legal_and_the_same_again(large: Problem) -> None:
    plans = large.space.plans[:40]
    told = [(plan, Outcome("out_of_memory") if place % 9 == 0 else priced(plan)) for place, plan in enumerate(plans)]
    once, twice = (Surrogate(large.space).propose(told, 8, set(plans), np.random.default_rng(3)) for _ in range(2))
    assert once == twice
    assert len(set(once)) == 8
    assert not set(once) & set(plans)
    assert all(plan in large.space for plan in once)


def test_half_of_the_proposals_in_a_large_space_are_beside_the_best_plan(large: Problem) -> None:
    plans = large.space.plans[:40]
    told = [(plan, priced(plan)) for plan in plans]
    found = Surrogate(large.space).propose(told, 8, set(plans), np.random.default_rng(3))
    best = min(told, key=lambda one: worth(one[1]))[0]
    beside = [plan in large.space.grid.neighbours(best) for plan in found]
    assert [beside[place] for place in (0, 1, 4, 5)] == [True] * 4
    assert not all(beside)


POINTS = st.lists(st.tuples(st.floats(1, 100), st.floats(1, 100)), min_size=1, max_size=12)


@given(POINTS, st.tuples(st.floats(1, 100), st.floats(1, 100)))
def test_hypervolume_by_counting_and_its_gain(points: list[tuple[float, float]], new: tuple[float, float]) -> None:
    goals = np.array(points)
    reference = reference_of(goals[front_of(goals)])
    whole = hypervolume(goals, reference)
    # Exact by cells between all coordinates.
    ups = np.unique(np.concatenate([[0.0], goals[:, 0]]))
    downs = np.unique(np.concatenate([goals[:, 1], [reference[1]]]))
    cells = sum(
        (right - left) * (top - bottom)
        for left, right in itertools.pairwise(ups)
        for bottom, top in itertools.pairwise(downs)
        if top <= reference[1] and ((goals[:, 0] >= right) & (goals[:, 1] <= bottom)).any()
    )
    assert whole == pytest.approx(cells, rel=1e-9, abs=1e-9)
    front = goals[front_of(goals)]
    more = hypervolume(np.concatenate([goals, [new]]), reference) - whole
    added = gained(np.array([new[0]]), np.array([new[1]]), front, reference)[0]
    assert added == pytest.approx(more, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("sampler", "why"), [("cmaes", "ignores constraints"), ("qmc", "ignores constraints")])
def test_samplers_that_ignore_constraints_are_refused(sampler: str, why: str, tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path, small(search={"sampler": sampler}, objective={"slo": {"tpot_p99_ms": 100}}))
    assert run(["tune", str(path), "--trials", "2", "--out", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err
    assert f"{sampler} {why}" in line
    assert line.count("\n") == 1
    assert not (tmp_path / "run" / "study.journal").exists()


def test_a_sampler_of_one_objective_is_refused(tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path, small(search={"sampler": "cmaes"}, objective={"slo": {}}))
    assert run(["tune", str(path), "--trials", "2", "--out", str(tmp_path / "run")]) == 2
    assert "cmaes takes one objective" in capsys.readouterr().err


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3", "qmc", "gp", "random"])
def test_every_other_sampler_searches(sampler: str, tmp_path: Path) -> None:
    if sampler == "gp":
        pytest.importorskip("torch")
    problem = problem_of(FOLDER / "deepseek_v3.yaml")
    table = read_table(FOLDER / "deepseek_v3.parquet", problem.space)
    one, again = (scores(problem, table, sampler, 24 if sampler == "gp" else 72, [1]) for _ in range(2))
    assert one == again
    assert one[0].regret < 0.1


def test_the_command_makes_a_table_and_notices_another_space(tmp_path: Path, capsys: Any) -> None:
    search = {"solvers": ["greedy"], "redundant_experts": [0]}
    data = small(search=search)
    data["serving"]["workload"]["requests"] = 40
    path, table = write(tmp_path, data), tmp_path / "table.parquet"
    asked = [str(path), "--table", str(table), "--seeds", "2", "--share", "0.6", "--samplers", "auto"]
    assert main(asked) == 0
    assert "auto: regret median" in capsys.readouterr().out
    data["search"]["redundant_experts"] = [0, 8]
    write(tmp_path, data)
    assert main(asked) == 2
    assert "another space" in capsys.readouterr().err
