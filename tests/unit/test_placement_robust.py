"""The robust solvers' parts: draws, weights by risk, effort; `exact` and two slots a GPU by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.spec.plan import PlacementRequest, max_over_mean
from placement.problem import solve
from placement.solvers import robust
from placement.solvers.draws import bootstrapped, drifted, even
from placement.solvers.two_slots import counts_below, hottest, pair


def request(loads: np.ndarray, slots: int, ranks: int) -> PlacementRequest:
    scenarios, layers, _ = loads.shape
    return PlacementRequest(
        loads=loads / loads.sum(axis=-1, keepdims=True),
        weights=np.full(scenarios, 1.0 / scenarios),
        layer_ids=np.arange(layers),
        absolute_layers=layers,
        slots=slots,
        ranks=ranks,
    )


@pytest.fixture
def files() -> np.ndarray:
    rng = np.random.default_rng(1)
    loads = rng.lognormal(0.0, 0.8, (1, 4, 32)) * rng.lognormal(0.0, 0.5, (4, 4, 32))
    return np.asarray(loads / loads.sum(axis=-1, keepdims=True))


def test_drifted_draws_lie_about_the_mean_along_the_differences_of_the_files(files: np.ndarray) -> None:
    weights = np.asarray([0.4, 0.3, 0.2, 0.1])
    drawn = drifted(files, weights)
    assert drawn.shape == (6, 4, 32)
    assert drawn.sum(axis=-1) == pytest.approx(np.ones((6, 4)))
    mean = np.tensordot(weights, files, axes=1)
    off = (drawn - mean).reshape(6, -1)
    assert off[:3] == pytest.approx(-off[3:])
    assert np.linalg.norm(off, axis=1) == pytest.approx(np.full(6, np.linalg.norm(off[0])))
    spread = (files - mean).reshape(4, -1)
    assert np.linalg.matrix_rank(np.concatenate([spread, off]), tol=1e-9) == 3  # nowhere else than the files differ
    # Along the first direction, the distance is the standard deviation of the files there.
    along = spread @ off[0] / np.linalg.norm(off[0])
    assert np.sqrt(weights @ along**2) == pytest.approx(np.linalg.norm(off[0]))


def test_files_that_agree_give_no_drift_and_still_a_placement(files: np.ndarray) -> None:
    twice = np.repeat(files[:1], 2, axis=0)
    assert len(drifted(twice, np.full(2, 0.5))) == 0
    assert solve(request(twice, 40, 8), "robust").placement.duplicates_on_one_rank() == 0


def test_bootstrap_draws_are_mixes_and_the_even_load_is_even(files: np.ndarray) -> None:
    mixes = bootstrapped(files, np.full(4, 0.25), 5, np.random.default_rng(0))
    assert mixes.sum(axis=-1) == pytest.approx(np.ones((5, 4)))
    assert (mixes <= files.max(axis=0) + 1e-12).all()
    assert (mixes >= files.min(axis=0) - 1e-12).all()
    assert even(files) == pytest.approx(np.full((1, 4, 32), 1 / 32))


def test_cvar_caps_a_file_and_worst_does_not() -> None:
    weights = np.full(4, 0.25)
    balance = np.asarray([1.5, 1.1, 1.1, 1.1])
    worst, capped = weights, weights
    for _ in range(20):
        worst = robust._tilted(worst, balance, weights, 0.0)
        capped = robust._tilted(capped, balance, weights, 0.5)
    assert worst[0] > 0.99
    assert capped == pytest.approx([0.5, 1 / 6, 1 / 6, 1 / 6])


def test_worst_lowers_the_worst_file(files: np.ndarray) -> None:
    hard = files.copy()
    hard[0] = np.random.default_rng(2).lognormal(0.0, 2.0, (4, 32))
    asked = request(hard, 40, 8)
    found = {}
    for risk in ("mean", "worst"):
        placed = robust.place(asked, robust.RobustOptions(risk=risk, draws="none", even=False), risk)
        found[risk] = max_over_mean(placed.rank_loads(asked.loads)).mean(axis=1)
    assert found["worst"].max() < found["mean"].max()


def test_the_risk_of_balances_is_their_mean_the_mean_of_the_worst_part_or_the_worst() -> None:
    balance, weights = np.asarray([1.1, 1.5, 1.2]), np.asarray([0.5, 0.25, 0.25])
    figure = {
        risk: robust._risk(balance, weights, robust.RobustOptions(risk=risk)) for risk in ("mean", "cvar", "worst")
    }
    assert figure == pytest.approx({"mean": 1.225, "cvar": 1.35, "worst": 1.5})


def test_less_effort_is_another_placement_no_illegal_one(files: np.ndarray) -> None:
    asked = request(files, 40, 8)
    hasty = solve(replace(asked, effort=0.05), "robust").placement
    assert hasty.duplicates_on_one_rank() == 0
    assert not np.array_equal(hasty.physical_to_logical, solve(asked, "robust").placement.physical_to_logical)


def test_one_load_leaves_robust_nothing_to_hedge_between(files: np.ndarray) -> None:
    asked = request(files[:1], 40, 8)
    greedy, one = solve(asked, "greedy").placement, solve(asked, "robust").placement
    assert np.array_equal(greedy.physical_to_logical, one.physical_to_logical)


def test_exact_refuses_large_requests_by_name(files: np.ndarray) -> None:
    with pytest.raises(BadInput, match="exact does not take 32 experts in 5 slots on each of 8 GPUs"):
        solve(request(files, 40, 8), "exact")


def test_pairs_put_the_heaviest_with_the_lightest_and_keep_an_expert_apart() -> None:
    weight, count = np.asarray([0.5, 0.3, 0.2]), np.asarray([2, 1, 1])
    table = pair(weight, count, 2)  # shares 0.3, 0.25, 0.25, 0.2: in order, expert 0 would meet itself
    assert sorted(map(sorted, table.reshape(2, 2).tolist())) == [[0, 1], [0, 2]]
    assert hottest(table, weight, count) == pytest.approx(0.55)


def test_counts_below_a_limit_exist_or_are_disproven() -> None:
    weight = np.asarray([0.6, 0.2, 0.2])
    count, told = counts_below(weight, 2, 0.5)
    assert told
    assert count is not None
    assert count.tolist() == [2, 1, 1]
    assert counts_below(weight, 2, 0.49) == (None, True)
