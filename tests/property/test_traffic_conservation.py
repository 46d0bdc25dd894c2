"""Traffic: what leaves arrives, nothing is negative, more load never costs less, balance is its own equivalent."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cost.estimate import Tag
from moesim.network.traffic import (
    LegCopies,
    _busiest_low_latency,
    _busiest_normal,
    equivalent_tokens,
    fan_out_tag,
    low_latency_copies,
    normal_copies,
    pair_copies,
    visit_chances,
)
from moesim.spec.plan import ExpertPlacement

Mode = Literal["normal", "low_latency"]
MODES: list[Mode] = ["normal", "low_latency"]
seeds = st.integers(0, 2**32 - 1)
shapes = st.sampled_from([(1, 4), (2, 4), (4, 2), (1, 1), (3, 3), (2, 1)])


def by_node(values: np.ndarray, nodes: int) -> np.ndarray:
    return values.reshape(*values.shape[:-1], nodes, -1).sum(axis=-1)


def conserved(copies: LegCopies, nodes: int) -> None:
    for leg in (copies.nic_out, copies.nic_in, copies.nvlink_out, copies.nvlink_in):
        assert (leg >= 0).all()
    assert np.allclose(copies.nic_out.sum(axis=-1), copies.nic_in.sum(axis=-1))
    assert np.allclose(by_node(copies.nvlink_out, nodes), by_node(copies.nvlink_in, nodes))
    if nodes == 1:
        assert np.allclose(copies.nic_out, 0)


@given(seeds, shapes)
@settings(max_examples=60, deadline=None)
def test_what_leaves_arrives(seed: int, shape: tuple[int, int]) -> None:
    nodes, per_node = shape
    ranks = nodes * per_node
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 50, (3, 1, ranks)).astype(float)
    tokens[0, 0, 0] += 1
    loads = rng.random((3, 2, ranks))
    loads *= tokens.sum(axis=-1, keepdims=True) * 2 / loads.sum(axis=-1, keepdims=True)
    low = low_latency_copies(tokens, loads, nodes=nodes)
    conserved(low, nodes)
    pairs = pair_copies(tokens, loads)
    assert np.allclose(pairs.sum(axis=-2), loads)
    local = np.einsum("...ii->...i", pairs)
    assert np.allclose(low.nic_in + low.nvlink_in + local, loads)
    assert np.allclose(low.nic_out + low.nvlink_out + local, pairs.sum(axis=-1))
    rank_visits = rng.random((3, 2, ranks))
    node_visits = 1 - np.prod(1 - rank_visits.reshape(3, 2, nodes, per_node), axis=-1)
    normal = normal_copies(tokens, rank_visits, node_visits)
    conserved(normal, nodes)
    for copies, busiest in (
        (low, _busiest_low_latency(tokens[:, 0], loads, per_node)),
        (normal, _busiest_normal(tokens[:, 0], rank_visits, node_visits, per_node)),
    ):
        legs = [copies.nic_out, copies.nic_in, copies.nvlink_out, copies.nvlink_in]
        assert np.allclose(busiest, np.stack([leg.max(axis=-1) for leg in legs], axis=-1), atol=1e-9)


def placement(layers: int, experts: int, ranks: int, rng: np.random.Generator) -> ExpertPlacement:
    table = np.stack([rng.permutation(experts) for _ in range(layers)])
    return ExpertPlacement(table, np.arange(layers), experts, ranks, layers)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (8, 4)])
def test_a_balanced_exchange_is_its_own_equivalent(mode: Mode, nodes: int, groups: int, top_groups: int) -> None:
    plan = ExpertPlacement(np.tile(np.arange(64), (2, 1)), np.arange(2), 64, 16, 2)
    tokens = np.full((3, 16), 100.0) * np.asarray([[1], [2], [0]])
    counts = np.broadcast_to(tokens.sum(axis=1)[:, None, None] * 4 / 64, (3, 2, 64))
    found = equivalent_tokens(
        mode=mode,
        tokens=tokens,
        rank_loads=plan.rank_loads(counts),
        placement=plan,
        counts=counts,
        top_k=4,
        groups=groups,
        top_groups=top_groups,
        nodes=nodes,
    )
    assert np.allclose(found, np.asarray([100.0, 200.0, 0.0])[:, None], atol=1e-9)


@given(seeds, st.sampled_from(MODES), st.sampled_from([1, 2, 4]))
@settings(max_examples=40, deadline=None)
def test_more_tokens_never_cost_less_and_imbalance_never_less_than_balance(seed: int, mode: Mode, nodes: int) -> None:
    rng = np.random.default_rng(seed)
    plan = placement(2, 32, 8, rng)
    tokens = rng.integers(1, 100, (4, 8)).astype(float)
    share = rng.dirichlet(np.full(32, 3.0), size=(4, 2))
    counts = share * tokens.sum(axis=1)[:, None, None] * 4

    def price(scale: float, where: np.ndarray) -> np.ndarray:
        return equivalent_tokens(
            mode=mode,
            tokens=where * scale,
            rank_loads=plan.rank_loads(counts) * scale,
            placement=plan,
            counts=counts * scale,
            top_k=4,
            nodes=nodes,
        )

    once = price(1.0, tokens)
    assert np.allclose(price(3.0, tokens), 3 * once)
    if mode == "low_latency":
        assert (once >= tokens.mean(axis=1)[:, None] * (1 - 1e-9)).all()
    even = np.broadcast_to(tokens.mean(axis=1, keepdims=True), tokens.shape)
    hot = even.copy()
    hot[:, 0] += even[:, 0] * 4
    hot *= even.sum(axis=1, keepdims=True) / hot.sum(axis=1, keepdims=True)
    assert (price(1.0, hot) >= price(1.0, even) * (1 - 1e-9)).all()


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_visit_chances_are_chances_and_a_node_is_at_least_its_best_rank(seed: int) -> None:
    rng = np.random.default_rng(seed)
    plan = placement(2, 32, 8, rng)
    counts = rng.dirichlet(np.full(32, 5.0), size=2) * 1000
    for gate in ({}, {"groups": 4, "top_groups": 2}):
        ranks, nodes = visit_chances(counts, plan, top_k=4, nodes=2, **gate)
        assert (ranks >= 0).all()
        assert (nodes <= 1).all()
        assert (nodes >= ranks.reshape(2, 2, 4).max(axis=2) - 1e-9).all()
        assert (nodes <= ranks.reshape(2, 2, 4).sum(axis=2) + 1e-9).all()
        assert (ranks.sum(axis=1) <= 4 + 1e-9).all()


def test_on_one_rank_nothing_travels_and_tags_are_honest() -> None:
    plan = ExpertPlacement(np.asarray([[0, 1]]), np.asarray([0]), 2, 1, 1)
    found = equivalent_tokens(
        mode="normal",
        tokens=np.asarray([[7.0]]),
        rank_loads=np.asarray([[[14.0]]]),
        placement=plan,
        counts=np.asarray([[[7.0, 7.0]]]),
        top_k=2,
    )
    assert found.tolist() == [[7.0]]
    assert fan_out_tag("low_latency") is Tag.FORMULA
    assert fan_out_tag("normal") is Tag.ASSUMED
