"""Plans of the fabric lab: every row arrives once, where its token picks; copies are those that moesim counts."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.network.traffic import visits_from_ids
from validate.fabric.plan import RankPlan, Tokens, flat_plans, tokens_of, two_level_plans
from validate.fabric.spec import PATTERNS, LabSpec


@st.composite
def patterns(draw: st.DrawFn) -> tuple[Tokens, int]:
    nodes, each, picks = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    ranks = nodes * each
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    targets = tuple(rng.integers(0, ranks, size=(draw(st.integers(0, 12)), picks)) for _ in range(ranks))
    return Tokens("drawn", targets), nodes


def run(plans: list[RankPlan], groups: list[list[list[int]]]) -> list[list[tuple[int, int]]]:
    """Carry out the plans: what every rank has after each stage is what it passes on in the next."""
    held = [list(map(tuple, plan.rows.tolist())) for plan in plans]
    for stage, by_stage in enumerate(groups):
        boxes: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for members in by_stage:
            for rank in members:
                one = plans[rank].stages[stage]
                rows = [held[rank][row] for row in one.take.tolist()]
                ends = np.cumsum(one.send).tolist()
                assert ends[-1] == len(rows)
                for peer, end, count in zip(members, ends, one.send.tolist(), strict=True):
                    boxes[rank, peer] = rows[end - count : end]
        fresh = []
        for rank in range(len(plans)):
            members = next(group for group in by_stage if rank in group)
            for peer, count in zip(members, plans[rank].stages[stage].receive.tolist(), strict=True):
                assert len(boxes[peer, rank]) == count
            fresh.append([row for peer in members for row in boxes[peer, rank]])
        last = stage == len(groups) - 1
        held = fresh if last else [own + came for own, came in zip(held, fresh, strict=True)]
    return held  # type: ignore[return-value]


@settings(max_examples=60, deadline=None)
@given(patterns())
def test_flat_brings_one_row_for_each_pick(given_: tuple[Tokens, int]) -> None:
    tokens, _ = given_
    everyone = [list(range(tokens.ranks))]
    for rank, got in enumerate(run(flat_plans(tokens), [everyone])):
        wanted = Counter(
            (source, token)
            for source, target in enumerate(tokens.targets)
            for token, picks in enumerate(target.tolist())
            for pick in picks
            if pick == rank
        )
        assert Counter(got) == wanted
        assert got == list(map(tuple, flat_plans(tokens)[rank].expected.tolist()))
    assert tokens.flat().sum() == sum(target.size for target in tokens.targets)


@settings(max_examples=60, deadline=None)
@given(patterns())
def test_two_level_brings_each_token_once_to_each_rank_that_it_visits(given_: tuple[Tokens, int]) -> None:
    tokens, nodes = given_
    each = tokens.ranks // nodes
    rails = [[node * each + place for node in range(nodes)] for place in range(each)]
    inside = [list(range(node * each, (node + 1) * each)) for node in range(nodes)]
    plans = two_level_plans(tokens, nodes)
    for rank, got in enumerate(run(plans, [rails, inside])):
        wanted = {
            (source, token)
            for source, target in enumerate(tokens.targets)
            for token, picks in enumerate(target.tolist())
            if rank in picks
        }
        assert len(got) == len(wanted) and set(got) == wanted
        assert got == list(map(tuple, plans[rank].expected.tolist()))


@settings(max_examples=60, deadline=None)
@given(patterns())
def test_copies_are_the_visits_that_moesim_counts(given_: tuple[Tokens, int]) -> None:
    tokens, nodes = given_
    home = np.arange(tokens.ranks)
    for rank, target in enumerate(tokens.targets):
        by_rank, by_node = visits_from_ids(target, home, tokens.ranks, nodes)
        assert (tokens.rank_copies()[rank] == by_rank).all()
        assert (tokens.node_copies(nodes)[rank] == by_node).all()


def test_patterns_are_drawn_by_the_seed_and_carry_what_is_asked() -> None:
    lab = LabSpec(name="lab", nodes=2, ranks_per_node=2, nic_bits_per_s=1e8, bytes_per_rank=1_000_000)
    other = lab.model_copy(update={"seed": 1})
    for name in PATTERNS:
        tokens, again = tokens_of(lab, name), tokens_of(lab, name)
        assert all((one == two).all() for one, two in zip(tokens.targets, again.targets, strict=True))
        moved = tokens.flat().sum() * lab.row_bytes / lab.ranks
        assert 0.97 * lab.bytes_per_rank < moved <= 1.03 * lab.bytes_per_rank
        if name != "even":
            assert any(
                one.shape != two.shape or (one != two).any()
                for one, two in zip(tokens.targets, tokens_of(other, name).targets, strict=True)
            )
    assert np.ptp(tokens_of(lab, "even").flat()) <= 1
    planned, contiguous = (tokens_of(lab, name).flat().sum(axis=0) for name in ("routed_planned", "routed_contiguous"))
    assert planned.max() < contiguous.max()
