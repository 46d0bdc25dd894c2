"""The placements that a validation compares: legal, named, from good to bad, made from the loads alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import Infeasible
from moesim.spec.plan import ExpertPlacement
from validate.hardware.job import synthetic_profile
from validate.hardware.layer import replica_routes
from validate.hardware.placements import family


def rank_work(slots: tuple[int, ...], profile: np.ndarray, ranks: int) -> np.ndarray:
    """Share of all rows that each rank computes where a replica on the spot is preferred: [ranks]."""
    table = np.asarray(slots)
    per_rank = len(table) // ranks
    found = np.zeros(ranks)
    for rank in range(ranks):
        routes, count = replica_routes(table, experts=len(profile), ranks=ranks, rank=rank, replica="local_first")
        for expert, share in enumerate(profile):
            for slot in routes[expert, : count[expert]]:
                found[slot // per_rank] += share / ranks / count[expert]
    return found


@settings(deadline=None)  # the first call loads the solver
@given(st.integers(1, 4), st.integers(2, 6), st.integers(1, 20), st.integers(0, 2**31))
def test_every_placement_is_legal_and_has_a_name_of_its_own(ranks: int, per_rank: int, count: int, seed: int) -> None:
    experts = ranks * per_rank
    profile = synthetic_profile(experts, np.random.default_rng(seed))
    found = family(profile, ranks=ranks, slots=experts, count=count, seed=seed)
    assert len(found) == len({case.name for case in found}) == count
    assert found[0].name == "contiguous" and found[0].slots == tuple(range(experts))
    for case in found:
        placement = ExpertPlacement(np.asarray([case.slots]), np.zeros(1, dtype=np.int64), experts, ranks, 1)
        assert placement.redundant == case.replicas
    assert found == family(profile, ranks=ranks, slots=experts, count=count, seed=seed)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_slowest_rank_of_the_family_spans_the_number_of_ranks(ranks: int) -> None:
    profile = synthetic_profile(32, np.random.default_rng([0, 9]))
    found = {case.name: case for case in family(profile, ranks=ranks, slots=32 + 2 * ranks, count=12, seed=0)}
    busiest = {name: rank_work(case.slots, profile, ranks).max() for name, case in found.items()}
    assert busiest["all_everywhere"] == pytest.approx(1 / ranks)
    assert busiest["all_on_rank_0"] > 0.97
    assert busiest["contiguous"] < busiest["packed_half"] < busiest["packed_most"] < busiest["hot_first"]
    assert busiest["planned_no_spare"] == min(busiest[name] for name in busiest if found[name].replicas == 0)
    thrice = found["thrice_on_rank_0"].slots[: 3 * 32]
    assert sorted(thrice) == sorted([*range(32)] * 3)


def test_without_a_solver_the_rest_is_there_and_random_ones_fill_up() -> None:
    profile = np.full(8, 1 / 8)
    found = [case.name for case in family(profile, ranks=2, slots=8, count=11, seed=0, planned=False)]
    assert not [name for name in found if name.startswith("planned")]
    assert found[:2] == ["contiguous", "hot_first"] and found[-2:] == ["random_1", "random_2"]


def test_slots_that_do_not_divide_are_refused() -> None:
    with pytest.raises(Infeasible, match="use 10 slots"):
        family(np.full(8, 1 / 8), ranks=2, slots=9, count=3, seed=0)
