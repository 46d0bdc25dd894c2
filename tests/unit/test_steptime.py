"""Placements compared in time: the same routing for all, the right number of tokens, paired draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.engine.deployment import groundwork, solve
from moesim.engine.routing_draws import RoutingDraws
from moesim.engine.steptime import timed_placements
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import Scenario, load_scenario
from tests.scenarios import small, write

PARALLEL = ParallelSpec(attention_dp=8, ep=8)
TOP_K = 8


@pytest.fixture
def scenario(tmp_path: Path) -> Scenario:
    return load_scenario(write(tmp_path, small()))


def placements(scenario: Scenario) -> tuple[Any, dict[str, Any]]:
    ground = groundwork(scenario)
    budgets = {"contiguous": 64, "greedy": 72}
    found = {
        name: solve(ground, name, slots=slots, parallel=PARALLEL, groups=1, loads=ground.fit)
        for name, slots in budgets.items()
    }
    return ground, found


@pytest.mark.parametrize("schedule", ["sequential", "two_batch"])
def test_a_step_routes_exactly_its_tokens(schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    counts = RoutingDraws.counts

    def spy(self: RoutingDraws, load: int, tokens: Any, rng: Any, **more: Any) -> Any:
        found = counts(self, load, tokens, rng, **more)
        asked.extend(found.sum(axis=-1).ravel().tolist())
        return found

    monkeypatch.setattr(RoutingDraws, "counts", spy)
    scenario = load_scenario(write(tmp_path, small(policies={"schedule": schedule})))
    ground, found = placements(scenario)
    timed_placements(ground, found, ground.judge, [16], 0, 0)
    whole = 16 * 8 * TOP_K
    priced = whole / 2 if schedule == "two_batch" else whole
    assert set(asked) == {priced, whole} if schedule == "two_batch" else {whole}


def test_one_placement_against_itself_gains_nothing(scenario: Scenario) -> None:
    ground, found = placements(scenario)
    same = {"one": found["greedy"], "other": found["greedy"]}
    for row in timed_placements(ground, same, ground.judge, [8, 64], 5, 0):
        assert np.array_equal(row.step_s["one"], row.step_s["other"])
        assert row.balance["one"] == row.balance["other"]


def test_steps_grow_with_tokens_and_intervals_hold_the_value(scenario: Scenario) -> None:
    ground, found = placements(scenario)
    rows = timed_placements(ground, found, ground.judge, [8, 32, 128], draws=20, seed=1)
    for name in found:
        best_known = [row.step_s[name][0] for row in rows]
        assert best_known == sorted(best_known)
        for row in rows:
            low, high = np.percentile(row.step_s[name][1:], [1, 99])
            assert low < row.step_s[name][0] < high
