"""The cost of a layer: by hand on small placements, and fitted to a scenario whose step times it must tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.engine.deployment import groundwork, solve
from moesim.engine.layer_cost import LayerCosts, packed
from moesim.engine.steptime import timed_placements
from moesim.routing.trace import stack_profiles
from moesim.spec.layer_cost import LayerCost, balance_cost, maximum_power, power_sum
from moesim.spec.parallel import ParallelSpec
from moesim.spec.plan import ExpertPlacement, max_over_mean
from moesim.spec.scenario import load_scenario
from tests.scenarios import small, write

PARALLEL = ParallelSpec(attention_dp=8, ep=8)


def placement(rows: list[list[int]], ranks: int, experts: int) -> ExpertPlacement:
    table = np.asarray(rows, dtype=np.int64)
    return ExpertPlacement(table, np.arange(len(rows)), experts, ranks, len(rows))


def cost(**changes: Any) -> LayerCost:
    given: dict[str, Any] = {
        "tokens_per_rank": 4.0, "top_k": 2, "nodes": 1, "expert_s": 3.0, "token_s": 1.0, "gpu_copy_s": 0.5,
        "experts_s": 10.0, "exchange_s": 20.0, "other_s": 100.0,
    }  # fmt: skip
    return LayerCost(**{**given, **changes})


def test_a_step_that_holds_its_loads_exactly_by_hand() -> None:
    # 2 ranks x 4 tokens x 2 picks = 16 tokens over 4 experts: 8, 4, 4 and none.
    loads = np.asarray([[[0.5, 0.25, 0.25, 0.0]]])
    plan = placement([[0, 1, 2, 3]], ranks=2, experts=4)
    # Rank 0 reads two experts for 12 tokens, rank 1 reads one for 4.
    assert cost().step_s(plan, loads, expected=False) == pytest.approx([100 + 10 + (2 * 3 + 12) + 20 + 0.5 * 12])


def test_expected_reads_are_those_of_drawn_tokens() -> None:
    loads = np.asarray([[[0.5, 0.3, 0.15, 0.05]]])
    plan = placement([[0, 1, 2, 3]], ranks=2, experts=4)
    touched, arriving = cost().visited(plan, loads, expected=True)
    drawn = np.random.default_rng(0).poisson(16 * loads[0, 0], (200_000, 4))
    assert touched[0, 0] == pytest.approx((drawn > 0).reshape(-1, 2, 2).sum(axis=-1).mean(axis=0), abs=5e-3)
    assert arriving[0, 0] == pytest.approx([12.8, 3.2])


def test_an_even_copy_of_a_cold_expert_costs_next_to_nothing_and_of_a_hot_one_a_read() -> None:
    loads = np.asarray([[[0.5, 0.496, 0.002, 0.002]]])
    cold = placement([[0, 2, 3, 1, 3, 2]], ranks=2, experts=4)
    hot = placement([[0, 2, 1, 1, 3, 0]], ranks=2, experts=4)
    reads = [cost().visited(plan, loads, expected=True)[0].sum() for plan in (cold, hot)]
    assert reads[0] == pytest.approx(2.0, abs=0.1)
    assert reads[1] == pytest.approx(4.0, abs=0.1)


def test_copies_by_visit_are_by_hand() -> None:
    # No gate groups: a token misses a rank with (1 - its share)^2.
    loads = np.asarray([[[0.4, 0.3, 0.2, 0.1]]])
    plan = placement([[0, 1, 2, 3]], ranks=4, experts=4)
    gpus, nodes = cost(by_visit=True, nodes=2).copies(plan, loads, np.zeros((1, 1, 4)))
    assert gpus[0, 0] == pytest.approx(16 * (1 - (1 - loads[0, 0]) ** 2))
    # For each of a node's two GPUs.
    assert nodes[0, 0] == pytest.approx(16 * (1 - (1 - np.asarray([0.7, 0.3])) ** 2) * 2 / 4)


def test_a_group_kept_on_one_node_makes_fewer_copies() -> None:
    loads = np.full((1, 1, 8), 1 / 8)
    limited = cost(by_visit=True, nodes=2, groups=4, top_groups=2, top_k=4)
    together = placement([[0, 1, 2, 3, 4, 5, 6, 7]], ranks=4, experts=8)
    apart = placement([[0, 2, 4, 6, 1, 3, 5, 7]], ranks=4, experts=8)
    near, far = (limited.copies(plan, loads, np.zeros((1, 1, 4)))[1].sum() for plan in (together, apart))
    assert near < far


def test_odds_open_as_many_groups_as_the_gate() -> None:
    limited = cost(groups=4, top_groups=2)
    loads = np.asarray([0.4, 0.4, 0.05, 0.05, 0.03, 0.03, 0.02, 0.02])
    odds = limited.group_odds(loads)
    assert odds.sum() == pytest.approx(2.0, abs=1e-6)
    assert odds[0] == 1.0
    assert (np.diff(odds) <= 1e-12).all()


@pytest.mark.parametrize(("ranks", "scatter"), [(32, 0.03), (32, 0.1), (144, 0.06)])
def test_the_power_sum_of_even_ranks_is_their_expected_maximum(ranks: int, scatter: float) -> None:
    drawn = 1 + scatter * np.random.default_rng(1).standard_normal((20_000, ranks))
    even = power_sum(np.ones(ranks), maximum_power(scatter, ranks))
    assert float(even) == pytest.approx(drawn.max(axis=1).mean(), abs=0.1 * scatter)


def test_without_time_the_cost_is_the_hottest_rank() -> None:
    loads = np.random.default_rng(2).dirichlet(np.ones(8), (1, 3))
    plan = placement([[*range(8)]] * 3, ranks=4, experts=8)
    found = balance_cost().layer_s(plan, loads, expected=False)
    assert found == pytest.approx(4 * max_over_mean(plan.rank_loads(loads)) / 4)


def test_packing_evens_out_and_places_every_expert() -> None:
    weight = np.random.default_rng(3).lognormal(0.0, 1.0, (4, 32))
    table = packed(weight, 40, 8)
    plan = placement(table.tolist(), ranks=8, experts=32)
    in_order = placement([[*range(32)]] * 4, ranks=8, experts=32)
    assert (max_over_mean(plan.rank_loads(weight)) < max_over_mean(in_order.rank_loads(weight))).all()


@pytest.mark.parametrize("schedule", ["sequential", "two_batch"])
@pytest.mark.parametrize("tokens", [8, 128])
def test_the_fitted_cost_tells_the_step_time_of_placements_it_has_not_seen(
    tmp_path: Path, schedule: str, tokens: int
) -> None:
    scenario = load_scenario(write(tmp_path, small(policies={"schedule": schedule})))
    ground = groundwork(scenario)
    fitted = LayerCosts(ground, ground.fit, 0).at(tokens)
    assert fitted.rel_error < 0.05
    found = {
        name: solve(ground, name, slots=slots, parallel=PARALLEL, groups=1, loads=ground.fit)
        for name, slots in {"contiguous": 64, "greedy": 64, "eplb": 72, "round_robin": 64}.items()
    }
    (timed,) = timed_placements(ground, found, ground.judge, [tokens], 0, 0)
    profiles, weights = stack_profiles(ground.judge)
    for name, plan in found.items():
        told = float(weights @ fitted.cost.step_s(plan, profiles))
        assert told == pytest.approx(float(timed.step_s[name][0]), rel=0.06)


def test_a_solver_that_reads_the_cost_gets_it_from_a_scenario(tmp_path: Path) -> None:
    ground = groundwork(load_scenario(write(tmp_path, small())))
    plan = solve(ground, "time", slots=72, parallel=PARALLEL, groups=1, loads=ground.fit)
    assert plan.notes["cost"] == "128 tokens per rank"
    asked = load_scenario(write(tmp_path, small(placement={"solver": "time", "tokens_per_rank": 16})))
    plan = solve(groundwork(asked), "time", slots=72, parallel=PARALLEL, groups=1, loads=ground.fit)
    assert plan.notes["cost"] == "16 tokens per rank"
