"""The search on time: its incremental sums are those of its result, it never makes a layer slower, maps stay legal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moesim.spec.layer_cost import LayerCost, power_sum
from moesim.spec.plan import ExpertPlacement, PlacementRequest
from placement.problem import solve
from placement.solvers.timed import cold_filled, improve


@st.composite
def requests(draw: st.DrawFn) -> PlacementRequest:
    nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    ranks, groups = nodes * per_node, draw(st.sampled_from([1, 2, 4]))
    experts = groups * draw(st.integers(1, 5))
    fewest = -(-experts // ranks)
    per_rank = draw(st.integers(fewest, max(fewest, min(experts, fewest + 2))))
    scenarios, layers = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    loads = rng.lognormal(0.0, draw(st.floats(0.0, 2.0)), (scenarios, layers, experts))
    seconds = st.sampled_from([0.0, 1e-8, 1e-6, 1e-5])
    cost = LayerCost(
        tokens_per_rank=draw(st.sampled_from([1.0, 8.0, 64.0])),
        top_k=draw(st.integers(1, min(4, experts))),  # a model that wants more experts than it has is refused
        nodes=nodes,
        expert_s=draw(seconds),
        token_s=draw(st.sampled_from([1e-8, 1e-7])),
        gpu_copy_s=draw(seconds),
        node_copy_s=draw(seconds),
        groups=groups,
        top_groups=draw(st.integers(1, groups)),
        by_visit=draw(st.booleans()),
        step_scatter=draw(st.floats(0.0, 0.3)),
        load_scatter=draw(st.floats(0.0, 0.3)),
    )
    return PlacementRequest(
        loads=loads / loads.sum(axis=-1, keepdims=True),
        weights=np.full(scenarios, 1.0 / scenarios),
        layer_ids=np.arange(layers),
        absolute_layers=layers,
        slots=per_rank * ranks,
        ranks=ranks,
        nodes=nodes,
        cost=cost,
    )


def seconds(request: PlacementRequest, placement: ExpertPlacement, doublings: tuple[int, int]) -> NDArray[np.float64]:
    """The search's objective written without it: [layers].

    A reading so short beside the rest that its power is no double any more counts as nothing, as it does in the search.
    """
    cost = request.cost
    assert cost is not None
    token_s = cost.token_s if cost.by_visit else cost.token_s + cost.gpu_copy_s
    unit = cost.expert_s * request.slots / request.ranks + token_s * cost.tokens_per_rank * cost.top_k
    touched, arriving = cost.visited(placement, request.loads, expected=True)
    gpus, nodes = cost.copies(placement, request.loads, arriving)
    reads, others = (float(2**one) for one in doublings)
    total = cost.expert_s * power_sum(touched, reads)
    total = np.where(total < unit * np.finfo(np.float64).tiny ** (1.0 / reads), 0.0, total)
    if cost.by_visit:
        ends = np.concatenate([cost.gpu_copy_s * gpus, cost.node_copy_s * nodes], axis=-1)
        total = total + cost.token_s * power_sum(arriving, others) + power_sum(ends, others)
    else:
        total = total + (cost.token_s + cost.gpu_copy_s) * power_sum(arriving, others)
    return np.asarray(np.tensordot(request.weights, total, axes=1))


def short_reading() -> PlacementRequest:
    """Two experts on two ranks: reading one takes 8e-6 of the layer, and of that the 64th power is no double."""
    cost = LayerCost(
        tokens_per_rank=64.0, top_k=2, nodes=1, expert_s=1e-8, token_s=1e-8, gpu_copy_s=1e-5, node_copy_s=0.0
    )
    return PlacementRequest(
        loads=np.full((1, 1, 2), 0.5), weights=np.ones(1), layer_ids=np.arange(1), absolute_layers=1, slots=2, ranks=2,
        nodes=1, cost=cost,
    )  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(requests())
@example(short_reading())
def test_the_search_knows_what_its_result_costs_and_never_makes_it_slower(request: PlacementRequest) -> None:
    assert request.cost is not None
    start = solve(request, "greedy").placement
    doublings = request.cost.doublings(start, request.loads)
    table = start.physical_to_logical.copy()
    told = improve(request, request.cost, table)
    found = request.placement(table, "searched")
    assert found.duplicates_on_one_rank() == 0
    assert (found.replica_counts() >= 1).all()
    after = seconds(request, found, doublings)
    np.testing.assert_allclose(told, after, rtol=1e-6)
    assert (after <= seconds(request, start, doublings) * (1 + 1e-6)).all()


@settings(max_examples=40, deadline=None)
@given(requests(), st.sampled_from(["time", "shadowing"]), st.booleans())
def test_solvers_keep_replicas_apart_and_every_expert_placed(
    request: PlacementRequest, name: str, priced: bool
) -> None:
    placement = solve(request if priced else replace(request, cost=None), name).placement
    assert placement.duplicates_on_one_rank() == 0
    assert (placement.replica_counts() >= 1).all()
    again = solve(request if priced else replace(request, cost=None), name).placement
    assert np.array_equal(placement.physical_to_logical, again.physical_to_logical)


@settings(max_examples=30, deadline=None)
@given(requests())
def test_groups_stay_on_their_nodes_where_they_must(request: PlacementRequest) -> None:
    cost = request.cost
    assert cost is not None
    if cost.groups % request.nodes or cost.groups == 1 or request.nodes == 1:
        return
    asked = replace(request, groups=cost.groups)
    if request.slots // request.nodes > (request.experts // request.nodes) * (request.ranks // request.nodes):
        return
    placement = solve(asked, "time").placement
    size = request.experts // cost.groups
    for row in placement.physical_to_logical.reshape(request.layers, request.nodes, -1):
        where = [set((node // size).tolist()) for node in row]
        assert sum(len(groups) for groups in where) == cost.groups


@settings(max_examples=30, deadline=None)
@given(requests())
def test_spare_slots_filled_cold_are_legal(request: PlacementRequest) -> None:
    fewest = -(-request.experts // request.ranks) * request.ranks
    placement = request.placement(cold_filled(request, request.mix(), fewest), "cold")
    assert placement.duplicates_on_one_rank() == 0


def test_shadowing_puts_the_hottest_on_every_rank() -> None:
    loads = np.arange(1.0, 17.0)[None, None] / np.arange(1.0, 17.0).sum()
    request = PlacementRequest(loads, np.ones(1), np.arange(1), 1, 24, 4)
    placement = solve(request, "shadowing").placement
    counts = placement.replica_counts()[0]
    assert counts[14:].tolist() == [4, 4]
    assert counts[:12].min() == 1
