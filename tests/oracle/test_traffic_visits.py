"""How many ranks and nodes a token visits: the model from counts against exact draws, and closed forms."""

from __future__ import annotations

import itertools
from math import comb

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.network.traffic import (
    balanced_visits,
    message_bytes,
    normal_copies,
    visit_chances,
    visits_from_ids,
)
from moesim.routing.sample import sample_topk_ids
from moesim.spec.plan import ExpertPlacement

EXPERTS, TOP_K, RANKS, NODES, GROUPS, TOP_GROUPS = 256, 8, 32, 4, 8, 4


def placed(order: np.ndarray, ranks: int = RANKS) -> ExpertPlacement:
    return ExpertPlacement(order[None], np.asarray([0]), len(np.unique(order)), ranks, 1)


def rank_of(placement: ExpertPlacement) -> np.ndarray:
    found = np.empty(placement.experts, dtype=np.int64)
    found[placement.physical_to_logical[0]] = np.arange(placement.slots) // placement.slots_per_rank
    return found


def group_limited(log_weight: np.ndarray, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """DeepSeek-V3's gate on noisy scores: groups by their two best experts, then the best experts of those open."""
    score = log_weight + rng.gumbel(size=(tokens, EXPERTS))
    by_group = np.sort(score.reshape(tokens, GROUPS, -1), axis=2)[..., -2:].sum(axis=2)
    shut = np.full((tokens, GROUPS), -np.inf)
    np.put_along_axis(shut, np.argsort(-by_group, axis=1)[:, :TOP_GROUPS], 0.0, axis=1)
    return np.argsort(-(score + np.repeat(shut, EXPERTS // GROUPS, axis=1)), axis=1)[:, :TOP_K]


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_model_against_exact_draws(scattered: bool, limited: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = 8_000
    group = np.repeat(rng.standard_normal(GROUPS), EXPERTS // GROUPS)
    log_weight = 0.55 * rng.standard_normal(EXPERTS) + 0.3 * group
    if limited:
        ids = group_limited(log_weight, tokens, rng)
    else:
        share = np.exp(log_weight) / np.exp(log_weight).sum()
        ids = sample_topk_ids(share, tokens, TOP_K, rng)
    counts = np.bincount(ids.ravel(), minlength=EXPERTS).astype(float)[None]
    placement = placed(rng.permutation(EXPERTS) if scattered else np.arange(EXPERTS))
    ranks, nodes = visits_from_ids(ids, rank_of(placement), RANKS, NODES)
    gate = {"groups": GROUPS, "top_groups": TOP_GROUPS} if limited else {}
    by_rank, by_node = visit_chances(counts, placement, top_k=TOP_K, nodes=NODES, **gate)
    rank_gap = by_rank.sum() / (ranks.sum() / tokens) - 1
    node_gap = by_node.sum() / (nodes.sum() / tokens) - 1
    assert -0.06 < rank_gap < 0.02
    assert -0.12 < node_gap < 0.02
    assert np.abs(by_rank[0] - ranks / tokens).max() < 0.08


def test_uniform_routing_has_closed_forms() -> None:
    by_rank, by_node = balanced_visits(ranks=32, nodes=4, experts=256, top_k=8)
    assert by_rank == pytest.approx(1 - comb(248, 8) / comb(256, 8))
    assert by_node == pytest.approx(1 - comb(192, 8) / comb(256, 8))
    # Group-limited: a node holds two of eight groups; list the sets of four open groups.
    open_sets = list(itertools.combinations(range(8), 4))
    missed = [comb(128 - 32 * sum(group < 2 for group in chosen), 8) / comb(128, 8) for chosen in open_sets]
    limited = balanced_visits(ranks=32, nodes=4, experts=256, top_k=8, groups=8, top_groups=4)
    assert limited[1] == pytest.approx(1 - np.mean(missed))


def test_replicas_share_the_visits() -> None:
    counts = np.ones((1, 8))
    plain = placed(np.arange(8), ranks=4)
    doubled = placed(np.asarray([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7]), ranks=8)
    first, _ = visit_chances(counts, plain, top_k=2)
    second, _ = visit_chances(counts, doubled, top_k=2)
    assert first.sum() == pytest.approx(4 * (1 - comb(6, 2) / comb(8, 2)))
    assert second.max() < first.min()


def test_visits_from_ids_by_hand() -> None:
    ids = np.asarray([[0, 1], [0, 3], [2, 3]])
    ranks, nodes = visits_from_ids(ids, np.asarray([0, 0, 1, 3]), 4, 2)
    assert ranks.tolist() == [2, 1, 0, 2]
    assert nodes.tolist() == [3, 2]
    with pytest.raises(BadInput, match="id lies outside"):
        visits_from_ids(np.asarray([[9]]), np.asarray([0]), 1, 1)
    with pytest.raises(BadInput, match="rank lies outside"):
        visits_from_ids(np.asarray([[0]]), np.asarray([5]), 4, 2)
    with pytest.raises(BadInput, match="nodes"):
        visits_from_ids(ids, np.asarray([0, 0, 1, 2]), 3, 2)


def test_normal_copies_by_hand() -> None:
    # Two nodes of two ranks; only rank 0 sends, 10 tokens, each to every rank.
    copies = normal_copies(np.asarray([10.0, 0, 0, 0]), np.ones(4), np.ones(2))
    assert copies.nic_out.tolist() == [10, 0, 0, 0]
    assert copies.nic_in.tolist() == [0, 0, 10, 0]
    assert copies.nvlink_out.tolist() == [10, 0, 10, 0]
    assert copies.nvlink_in.tolist() == [0, 10, 0, 10]


def test_message_bytes_as_deepep_lays_them_out() -> None:
    hidden = 7168
    assert message_bytes("dispatch", "low_latency", hidden=hidden, dtype="fp8", top_k=8) == hidden + 56 * 4 + 16
    assert message_bytes("dispatch", "low_latency", hidden=hidden, dtype="bf16", top_k=8) == 2 * hidden + 16
    assert message_bytes("combine", "low_latency", hidden=hidden, dtype="bf16", top_k=8) == 2 * hidden
    assert message_bytes("dispatch", "normal", hidden=hidden, dtype="fp8_block", top_k=8) == 7472  # 7464 aligned to 16
    assert message_bytes("combine", "normal", hidden=hidden, dtype="bf16", top_k=8) == 14384  # 14376 aligned to 16


def test_a_step_of_one_token_that_picked_from_few_groups_has_chances() -> None:
    counts = np.zeros((1, 256))
    counts[0, [0, 1, 2, 3, 32, 33, 34, 35]] = 1.0
    placement = ExpertPlacement(np.arange(256)[None], np.asarray([0]), 256, 32, 1)
    by_rank, by_node = visit_chances(counts, placement, top_k=8, groups=8, top_groups=4, nodes=4)
    assert ((by_rank >= 0) & (by_rank <= 1)).all()
    assert ((by_node >= 0) & (by_node <= 1)).all()
    assert by_rank[0, 0] > 0.9
    assert by_rank[0, 4] > 0.9
