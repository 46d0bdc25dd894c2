"""Placements of any request: legal, complete, never better than the bound, never worse for an improvement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.spec.plan import PlacementRequest, max_over_mean, mean_over_max
from placement.problem import solve
from placement.solvers import affinity
from placement.solvers.packing import pack_apart, replica_counts, row_max_over_mean, swap_down
from placement.solvers.search import search_layers


@pytest.fixture(scope="module", autouse=True)
def short_annealing() -> Iterator[None]:
    """What holds of every placement holds after few swaps, too; how good many make it: tests/oracle/test_copies.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(affinity, "SWAPS", 2_000)
        yield


@st.composite
def requests(draw: st.DrawFn) -> PlacementRequest:
    ranks = draw(st.integers(1, 8))
    experts = draw(st.integers(1, 24))
    fewest = -(-experts // ranks)
    per_rank = draw(st.integers(fewest, max(fewest, min(experts, fewest + 4))))
    scenarios, layers = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    loads = rng.lognormal(0.0, draw(st.floats(0.0, 3.0)), (scenarios, layers, experts))
    return PlacementRequest(
        loads=loads / loads.sum(axis=-1, keepdims=True),
        weights=np.full(scenarios, 1.0 / scenarios),
        layer_ids=np.arange(layers),
        absolute_layers=layers,
        slots=per_rank * ranks,
        ranks=ranks,
    )


@settings(max_examples=60, deadline=None)
@given(requests(), st.sampled_from(["contiguous", "round_robin", "greedy", "robust", "affinity"]))
def test_every_solver_keeps_replicas_apart_and_every_expert_placed(request: PlacementRequest, name: str) -> None:
    placement = solve(request, name).placement
    assert placement.duplicates_on_one_rank() == 0
    assert (placement.replica_counts() >= 1).all()
    loads = placement.rank_loads(request.loads)
    assert np.allclose(loads.sum(axis=-1), 1.0)
    balance = max_over_mean(loads)
    assert (balance >= 1.0 - 1e-12).all()
    assert np.allclose(mean_over_max(loads) * balance, 1.0)


@settings(max_examples=60, deadline=None)
@given(requests())
def test_greedy_replication_minimises_the_largest_replica(request: PlacementRequest) -> None:
    weight = request.loads[0, 0]
    count = replica_counts(weight, request.slots, request.ranks)
    assert count.sum() == request.slots
    assert count.max() <= request.ranks
    largest = (weight / count).max()
    # Any other counts: moving one replica away from an expert cannot lower the largest.
    for expert in np.nonzero(count > 1)[0]:
        fewer = count.copy()
        fewer[expert] -= 1
        hottest = int((weight / count).argmax())
        if hottest != expert and count[hottest] < request.ranks:
            fewer[hottest] += 1
            assert (weight / fewer).max() >= largest - 1e-12


@settings(max_examples=60, deadline=None)
@given(requests())
def test_swaps_and_search_never_make_the_largest_worse(request: PlacementRequest) -> None:
    weight = np.ascontiguousarray(request.loads[0, 0])
    count = replica_counts(weight, request.slots, request.ranks)
    table = pack_apart(weight, count, request.ranks)
    packed = float(row_max_over_mean(table[None], weight[None], request.ranks)[0])
    swap_down(table, weight, count, request.ranks, 0.0)
    swapped = float(row_max_over_mean(table[None], weight[None], request.ranks)[0])
    assert swapped <= packed + 1e-12
    greedy = solve(request, "greedy").placement
    mix = max_over_mean(greedy.rank_loads(request.mix()))
    assert (mix >= 1.0 - 1e-12).all()


@settings(max_examples=40, deadline=None)
@given(requests(), st.integers(0, 4))
def test_the_search_lowers_its_own_objective(request: PlacementRequest, doublings: int) -> None:
    start = solve(request, "contiguous").placement
    table = start.physical_to_logical.copy()
    loads = np.ascontiguousarray(request.loads.transpose(1, 0, 2))
    weights = np.ascontiguousarray(np.broadcast_to(request.weights, loads.shape[:2]))
    search_layers(table, loads, weights, request.ranks, request.ranks, doublings, 5)
    found = request.placement(table, "searched")
    assert found.duplicates_on_one_rank() == 0

    def objective(placement) -> np.ndarray:
        rank_loads = placement.rank_loads(request.loads) * request.ranks
        return np.tensordot(request.weights, (rank_loads ** (2**doublings)).sum(axis=-1), axes=1)

    assert (objective(found) <= objective(start) * (1 + 1e-9)).all()


@settings(max_examples=40, deadline=None)
@given(requests(), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_affinity_is_legal_and_as_even_as_greedy(request: PlacementRequest, nodes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (request.layers, request.experts, request.experts)
    together = rng.random(shape) * (1.0 - np.eye(request.experts))
    steps = rng.standard_normal((request.layers, 5, request.experts))
    asked = replace(
        request,
        nodes=nodes,
        coactivation=together + together.transpose(0, 2, 1),
        transitions=rng.random((request.layers - 1, *shape[1:])),
        dispersion=np.einsum("lse,lsf->lef", steps, steps),
    )
    found, greedy = solve(asked, "affinity").placement, solve(asked, "greedy").placement
    assert found.duplicates_on_one_rank() == 0
    assert np.array_equal(np.sort(found.physical_to_logical), np.sort(greedy.physical_to_logical))
    limit = np.maximum(max_over_mean(greedy.rank_loads(asked.mix())), 1.001)
    assert (max_over_mean(found.rank_loads(asked.mix())) <= limit + 1e-6).all()
