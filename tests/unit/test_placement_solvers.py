"""Conformance: what every registered solver must do, and what only some do."""

from __future__ import annotations

import numpy as np
import pytest

from moesim import plugins
from moesim.errors import BadInput, Infeasible
from moesim.routing.trace import RoutingCounts
from moesim.spec.placement_file import read_placement
from moesim.spec.plan import ExpertPlacement, PlacementRequest, max_over_mean
from placement.problem import request_from_loads, solve, without_redundancy
from placement.solvers.eplb import hierarchical

SOLVERS = sorted(plugins.available(plugins.SOLVERS))
APART = [name for name in SOLVERS if name != "eplb"]
PLAIN = ["contiguous", "eplb", "greedy", "robust", "round_robin"]
SHAPES = [(16, 16, 4), (16, 24, 4), (6, 12, 4), (10, 12, 6), (9, 18, 6), (5, 20, 4), (32, 40, 8), (3, 3, 1)]


def request(experts: int, slots: int, ranks: int, *, scenarios: int = 3, layers: int = 3, seed: int = 0, **more: int):
    rng = np.random.default_rng([experts, slots, ranks, seed])
    loads = rng.lognormal(0.0, 1.2, (scenarios, layers, experts))
    return PlacementRequest(
        loads=loads / loads.sum(axis=-1, keepdims=True),
        weights=np.full(scenarios, 1.0 / scenarios),
        layer_ids=np.arange(2, 2 + layers),
        absolute_layers=2 + layers,
        slots=slots,
        ranks=ranks,
        **more,
    )


def each(placement: ExpertPlacement, loads: np.ndarray) -> float:
    return float(max_over_mean(placement.rank_loads(loads)).mean())


def test_the_solvers_are_registered() -> None:
    robust = {"robust", "robust_bootstrap", "robust_cvar", "robust_worst"}
    named = {"affinity", "contiguous", "eplb", "exact", "greedy", "incremental", "round_robin", "shadowing", "time"}
    assert set(SOLVERS) >= named | robust


def skip_large(name: str, asked: PlacementRequest) -> None:
    """`exact` refuses what it cannot prove; the refusal has a test of its own."""
    small = asked.experts <= 12 and asked.ranks <= 8
    if name == "exact" and not small and asked.slots > 2 * asked.ranks:
        pytest.skip("larger than exact takes")


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(("experts", "slots", "ranks"), SHAPES)
def test_a_solver_gives_a_legal_placement(name: str, experts: int, slots: int, ranks: int) -> None:
    asked = request(experts, slots, ranks)
    skip_large(name, asked)
    placement = solve(asked, name).placement
    assert placement.solver == name
    assert placement.physical_to_logical.shape == (asked.layers, slots)
    assert placement.physical_to_logical.dtype == np.int64
    assert (placement.replica_counts() >= 1).all()
    assert np.array_equal(placement.layer_ids, asked.layer_ids)
    assert placement.rank_loads(asked.mix()).sum(axis=-1) == pytest.approx(np.ones(asked.layers))
    if name in APART:
        assert placement.duplicates_on_one_rank() == 0


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_is_deterministic_and_leaves_its_request_alone(name: str) -> None:
    asked = request(10, 16, 4)
    before = asked.loads.copy()
    first, second = solve(asked, name).placement, solve(asked, name).placement
    assert np.array_equal(first.physical_to_logical, second.physical_to_logical)
    assert np.array_equal(asked.loads, before)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_placement_survives_its_file(name: str, tmp_path) -> None:
    placement = solve(request(10, 16, 4), name).placement
    placement.write(tmp_path / "map.json")
    again = read_placement(tmp_path / "map.json")
    assert again.to_json() == placement.to_json()


@pytest.mark.parametrize("name", SOLVERS)
def test_loads_with_zeros_and_one_hot_expert(name: str) -> None:
    loads = np.zeros((1, 2, 8))
    loads[0, 0, 3] = 1.0
    loads[0, 1, :2] = 0.5
    asked = PlacementRequest(loads, np.ones(1), np.arange(2), 2, slots=12, ranks=4)
    placement = solve(asked, name).placement
    assert (placement.replica_counts() >= 1).all()


@pytest.mark.parametrize("name", APART)
def test_as_many_slots_as_can_be_puts_every_expert_on_every_rank(name: str) -> None:
    placement = solve(request(5, 20, 4), name).placement
    assert (placement.replica_counts() == 4).all()
    assert placement.duplicates_on_one_rank() == 0


def test_contiguous_starts_again_at_expert_0() -> None:
    placement = solve(request(6, 8, 4), "contiguous").placement
    assert placement.physical_to_logical[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]


def test_round_robin_deals_like_cards() -> None:
    placement = solve(request(8, 8, 4), "round_robin").placement
    assert placement.physical_to_logical[0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_eplb_gives_the_output_of_its_published_example() -> None:
    # Input and output stand in the README of github.com/deepseek-ai/EPLB.
    weight = np.asarray(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ],
        dtype=np.float64,
    )
    assert hierarchical(weight, slots=16, groups=4, nodes=2, gpus=8).tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def test_eplb_falls_back_to_one_group_and_says_so() -> None:
    uneven = solve(request(16, 24, 6, nodes=3, groups=4), "eplb").placement
    flat = solve(request(16, 24, 6), "eplb").placement
    assert np.array_equal(uneven.physical_to_logical, flat.physical_to_logical)
    assert uneven.notes["hierarchy"] == "one group"
    assert solve(request(16, 24, 4, nodes=2, groups=4), "eplb").placement.notes["hierarchy"] == "4 groups on 2 nodes"


@pytest.mark.parametrize("name", ["eplb", "greedy", "robust"])
def test_groups_stay_on_their_node(name: str) -> None:
    asked = request(16, 24, 8, nodes=2, groups=4)
    placement = solve(asked, name).placement
    for row in placement.physical_to_logical.reshape(asked.layers, 2, 12):
        first, second = ({int(expert) // 4 for expert in node} for node in row)
        assert not first & second
        assert len(first) == len(second) == 2
    if name in APART:
        assert placement.duplicates_on_one_rank() == 0


@pytest.mark.parametrize("name", ["affinity", "contiguous", "exact", "round_robin"])
def test_solvers_without_groups_refuse_them_and_name_those_that_can(name: str) -> None:
    with pytest.raises(BadInput, match="eplb, greedy, robust"):
        solve(request(16, 16, 4, nodes=2, groups=4), name)


@pytest.mark.parametrize("name", ["greedy", "robust"])
def test_groups_that_do_not_divide_are_infeasible(name: str) -> None:
    with pytest.raises(Infeasible) as caught:
        solve(request(16, 24, 6, nodes=3, groups=4), name)
    assert caught.value.reason == "groups_not_divisible"


def test_nodes_without_groups_constrain_nothing() -> None:
    one, four = solve(request(16, 24, 4), "greedy"), solve(request(16, 24, 4, nodes=4), "greedy")
    assert np.array_equal(one.placement.physical_to_logical, four.placement.physical_to_logical)


def test_greedy_beats_the_plain_solvers_and_robust_beats_greedy_on_many_loads() -> None:
    asked = request(64, 80, 8, scenarios=5, layers=6)
    figures = {name: each(solve(asked, name).placement, asked.loads) for name in PLAIN}
    assert figures["robust"] < figures["greedy"] < min(figures["contiguous"], figures["round_robin"])
    mix = {name: each(solve(asked, name).placement, asked.mix()) for name in ("greedy", "eplb")}
    assert mix["greedy"] <= mix["eplb"]


def test_requests_count_each_file_by_its_weight_alone() -> None:
    small = RoutingCounts(np.asarray([[[3.0, 1.0]]]), np.zeros(1, dtype=np.int64), 1, "small", weight=3.0)
    large = RoutingCounts(np.asarray([[[1e6, 3e6]]]), np.zeros(1, dtype=np.int64), 1, "large")
    asked = request_from_loads([small, large], slots=2, ranks=2)
    assert asked.mix() == pytest.approx(np.asarray([[0.75 * 0.75 + 0.25 * 0.25, 0.25 * 0.75 + 0.75 * 0.25]]))


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"ranks": 0}, BadInput, "--gpus"),
        ({"slots": -1}, BadInput, "--slots"),
        ({"slots": 9}, Infeasible, "use 10 slots"),
        ({"slots": 6}, Infeasible, "at least 8"),
        ({"slots": 18}, Infeasible, "at most 16"),
    ],
)
def test_impossible_requests_name_the_place_and_the_mend(change: dict[str, int], kind: type, text: str) -> None:
    load = RoutingCounts(np.ones((1, 1, 8)), np.zeros(1, dtype=np.int64), 1, "even")
    with pytest.raises(kind, match=text):
        request_from_loads([load], **{"slots": 8, "ranks": 2, **change})


def test_an_unknown_solver_and_no_loads_are_named() -> None:
    with pytest.raises(BadInput, match="contiguous, eplb, exact, greedy"):
        solve(request(8, 8, 4), "magic")
    with pytest.raises(BadInput, match="no loads"):
        request_from_loads([], slots=8, ranks=2)


def test_the_baseline_has_the_fewest_slots_that_the_ranks_allow() -> None:
    assert without_redundancy(request(16, 24, 4)).slots == 16
    assert without_redundancy(request(10, 18, 6)).slots == 12
