"""Plans as rows of numbers, against the plans themselves; what evaluating them takes; and what a store copies."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, distribution_to_json, json_to_distribution

from placement.outlay import Outlay
from placement.plans import Plan
from placement.search_problem import Problem, problem_of
from placement.space import Space
from placement.tuner import _distributions
from tests.scenarios import small, write

AXES = {"serving.memory.fraction": [0.8, 0.85], "serving.batching.chunked_prefill": [False]}


@pytest.fixture(params=["off", "auto"], scope="module")
def problem(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Problem:
    search = {"axes": AXES, "solvers": ["greedy", "robust"], "roles": request.param, "schedules": ["sequential"]}
    return problem_of(write(tmp_path_factory.mktemp("rows"), small(search=search)))


def test_rows_are_the_plans_and_keys_tell_them_apart(problem: Problem) -> None:
    grid, plans = problem.space.grid, problem.space.plans
    rows = grid.rows(plans)
    assert [grid.plan(row) for row in rows] == list(plans)
    assert len(np.unique(grid.keys(rows))) == len(plans)
    with pytest.raises(KeyError):
        grid.rows([replace(plans[0], solver="eplb")])


def test_keys_of_a_grid_beyond_64_bits_are_whole_numbers(problem: Problem) -> None:
    axis = problem.space.axes[0]
    many = tuple(replace(axis, values=tuple(range(1000))) for _ in range(7))
    space = replace(problem.space, axes=many)
    rows = np.array([[1, *[999] * 7], [1, *[999] * 6, 998]])
    assert list(space.grid.keys(rows)) == [2 * 10**21 - 1, 2 * 10**21 - 2]


def test_around_a_plan_are_those_of_the_grid_that_differ_in_one_choice(problem: Problem) -> None:
    space = problem.space
    for plan in (space.plans[0], space.plans[-1]):
        mine = _told(plan, space)
        for other in space.grid.neighbours(plan):
            theirs = _told(other, space)
            differ = [name for name in mine if mine[name] != theirs[name]]
            # Whether there are roles at all changes all that roles add.
            assert len(differ) == 1 or (mine["split"] == "none") != (theirs["split"] == "none")
        if plan.prefill is None:
            beside = Counter(
                other for other in _every(space) if sum(mine[name] != _told(other, space)[name] for name in mine) == 1
            )
            assert not beside - Counter(space.grid.neighbours(plan))


def _every(space: Space) -> list[Plan]:
    shown = list({plan.options for plan in space.plans})
    return [replace(base, options=one) for base in space.bases[:200] for one in shown]


def _told(plan: Plan, space: Space) -> dict[str, str]:
    found = plan.params()
    found["solver"], _, found["budget"] = found.pop("placement").partition(" ")
    if "prefill_placement" in found:
        found["prefill solver"], _, found["prefill budget"] = found.pop("prefill_placement").partition(" ")
    return {"split": "", **found}


def test_the_choices_of_a_grid_are_those_of_its_plans(problem: Problem) -> None:
    named = [base.params() for base in problem.space.bases]
    expected = {name: sorted({one[name] for one in named}) for name in named[0]}
    found = problem.space.grid.choices
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert sorted(found[name]) == values or name in AXES
    assert found["serving.memory.fraction"] == ["0.9", "0.8", "0.85"]


def test_what_an_evaluation_takes_is_what_nobody_worked_out_yet(problem: Problem) -> None:
    space = problem.space
    outlay = Outlay(space)
    robust = next(one for one in space.bases if one.solver == "robust" and one.prefill is None)
    greedy = next(one for one in space.bases if replace(one, solver="robust") == robust and one.solver == "greedy")
    rows = space.grid.rows([robust, greedy])
    assert list(outlay.runs(rows, [])) == [1.0 + 12.0 + 1.0, 1.0 + 1.0 + 1.0]
    assert list(outlay.runs(rows, [greedy])) == [1.0 + 12.0, 1.0]
    other = replace(robust, options=space.plans[-1].options)
    assert list(outlay.runs(rows, [other, greedy])) == [1.0, 1.0]
    if space.bases[-1].prefill is not None:
        both = space.grid.rows([space.bases[-1]])
        assert outlay.runs(both, [])[0] > outlay.runs(both, [space.bases[-1]])[0] == 1.0


def test_the_values_of_a_choice_are_not_copied_with_every_trial(problem: Problem) -> None:
    for name, one in _distributions(problem.space).items():
        again = copy.deepcopy(one)
        assert again.choices is one.choices
        assert again == CategoricalDistribution(problem.space.choices[name])
        assert json_to_distribution(distribution_to_json(one)) == again
