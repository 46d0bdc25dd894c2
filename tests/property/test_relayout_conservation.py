"""Whatever the two placements: the moves lead from one to the other, are the fewest, and lose no byte on the way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.relayout_moves import match_ranks, pair_bytes, plan_moves
from moesim.spec.plan import ExpertPlacement
from tests.oracle.test_relayout_by_hand import EXPERT_BYTES, instance, network_of

RANKS, NODE = 4, 2
DOMAINS = [0, 0, 1, 1]
FOUR = instance(RANKS, NODE)


def drawn(seed: int, experts: int, layers: int, per_rank: int) -> ExpertPlacement:
    """Any placement: every expert somewhere, the other slots anything, twice on one rank included."""
    rng = np.random.default_rng(seed)
    slots = RANKS * per_rank
    rows = [
        rng.permutation(np.concatenate([np.arange(experts), rng.integers(experts, size=slots - experts)]))
        for _ in range(layers)
    ]
    return ExpertPlacement(np.asarray(rows), np.arange(layers), experts, RANKS, layers)


cases = st.tuples(
    st.integers(0, 2**31), st.integers(0, 2**31), st.integers(2, 6), st.integers(1, 3), st.integers(2, 5)
).filter(lambda case: case[2] <= RANKS * case[4])


@given(cases)
@settings(max_examples=150, deadline=None)
def test_moves_lead_from_one_map_to_the_other_and_are_the_fewest(case: tuple[int, int, int, int, int]) -> None:
    one, other, experts, layers, per_rank = case
    old, new = drawn(one, experts, layers, per_rank), drawn(other, experts, layers, per_rank)
    moves = plan_moves(old, new, DOMAINS)
    before, after = (plan.physical_to_logical.reshape(layers, RANKS, -1) for plan in (old, new))
    least = 0
    for layer in range(layers):
        for rank in range(RANKS):
            held, wanted = set(before[layer, rank]), set(after[layer, rank])
            here = (moves.layer == layer) & (moves.destination == rank)
            got = moves.expert[here].tolist()
            assert sorted(got) == sorted(wanted - held)  # each once, and nothing that it has or does not want
            # Every slot stays, is received or is copied.
            kept = int((before[layer, rank] == after[layer, rank]).sum())
            assert kept + len(got) + moves.copies[layer, rank] == per_rank
            least += len(wanted - held)
    assert moves.count == least
    for layer, expert, source, destination in zip(
        moves.layer, moves.expert, moves.source, moves.destination, strict=True
    ):
        holders = {rank for rank in range(RANKS) if expert in before[layer, rank]}
        near = {rank for rank in holders if DOMAINS[rank] == DOMAINS[destination]}
        assert source in (near or holders)


@given(cases)
@settings(max_examples=60, deadline=None)
def test_bytes_out_are_bytes_in_at_every_gpu_and_link(case: tuple[int, int, int, int, int]) -> None:
    one, other, experts, layers, per_rank = case
    old, new = drawn(one, experts, layers, per_rank), drawn(other, experts, layers, per_rank)
    moves = plan_moves(old, new, DOMAINS)
    pairs = pair_bytes(moves, replace(FOUR.setup, placement=old)).sum(axis=0)
    for gpu in range(RANKS):
        assert pairs[gpu].sum() == EXPERT_BYTES * (moves.source == gpu).sum()
        assert pairs[:, gpu].sum() == EXPERT_BYTES * (moves.destination == gpu).sum()
    edges, loads = network_of(FOUR.setup).exchange("flat").topology.link_loads(pairs)
    assert (loads >= 0).all()
    out: dict[str, float] = {}
    for (begin, end), load in zip(edges, loads, strict=True):
        out[begin] = out.get(begin, 0.0) + load
        out[end] = out.get(end, 0.0) - load
    gpus = {vertex: value for vertex, value in out.items() if vertex.startswith("gpu")}
    assert len(gpus) == RANKS
    assert all(value == 0.0 for vertex, value in out.items() if vertex not in gpus)  # switches keep nothing
    for gpu in range(RANKS):
        assert gpus[f"gpu{gpu}"] == pairs[gpu].sum() - pairs[:, gpu].sum()


@given(cases)
@settings(max_examples=60, deadline=None)
def test_matching_ranks_moves_no_more_and_leaves_the_balance(case: tuple[int, int, int, int, int]) -> None:
    one, other, experts, layers, per_rank = case
    old, new = drawn(one, experts, layers, per_rank), drawn(other, experts, layers, per_rank)
    matched = match_ranks(old, new, [0] * RANKS)
    assert plan_moves(old, matched, DOMAINS).count <= plan_moves(old, new, DOMAINS).count
    loads = np.random.default_rng(one).random((layers, experts))
    for plan in (new, matched):
        assert plan.slots == new.slots
    np.testing.assert_array_equal(np.sort(matched.rank_loads(loads), axis=1), np.sort(new.rank_loads(loads), axis=1))


def test_nothing_moves_to_where_it_is() -> None:
    plan = drawn(1, 5, 3, 4)
    moves = plan_moves(plan, plan, DOMAINS)
    assert moves.count == 0
    assert not moves.copies.any()
