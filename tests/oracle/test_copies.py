"""Copies between nodes against brute force, and the affinity solver against the best grouping there is."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.network.traffic import visits_from_ids
from moesim.routing.picks import TokenPicks
from moesim.spec.plan import ExpertPlacement, PlacementRequest
from placement.copies import count_copies
from placement.problem import solve


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4]), st.sampled_from(["equal", "local_first"]), st.booleans())
def test_copies_are_those_of_sets(seed: int, nodes: int, replica: str, replicas: bool) -> None:
    rng = np.random.default_rng(seed)
    tokens, layers, experts, top_k, ranks = 7, 2, 8, 3, 4
    slots = 12 if replicas else 8
    table = np.stack([np.concatenate([rng.permutation(8), rng.integers(0, 8, slots - 8)]) for _ in range(layers)])
    placement = ExpertPlacement(table, np.arange(layers), experts, ranks, layers)
    ids = np.stack([[rng.permutation(8)[:top_k] for _ in range(layers)] for _ in range(tokens)]).astype(np.int16)
    ids[0, 0, 2] = -1
    request = rng.integers(0, 3, tokens)
    found = count_copies(
        placement, TokenPicks(ids, np.zeros(tokens, np.int64), True, request), nodes=nodes, replica=replica, blocks=1
    )

    def serving(layer: int, expert: int, home: int, token: int) -> int:
        where = [slot // (slots // nodes) for slot in range(slots) if table[layer, slot] == expert]
        return home if replica == "local_first" and home in where else where[(token + expert) % len(where)]

    visits = np.zeros((3, nodes))
    for token, layer in np.ndindex(tokens, layers):
        for e in ids[token, layer][ids[token, layer] >= 0]:
            where = [slot // (slots // nodes) for slot in range(slots) if table[layer, slot] == e]
            visits[request[token], where[(token + e) % len(where)]] += 1
    normal = single = by_request = stay = 0.0
    for token, layer in np.ndindex(tokens, layers):
        picks = [int(e) for e in ids[token, layer] if e >= 0]
        for home in range(nodes):
            served = [serving(layer, e, home, token) for e in picks]
            normal += len(set(served) - {home}) / nodes
            single += sum(node != home for node in served) / nodes
            if layer == 0:
                stay += (len(set(served) - {home}) + len(set(served)) - 1) / 2 / nodes
        best = int(visits[request[token]].argmax())
        by_request += len({serving(layer, e, best, token) for e in picks} - {best})
        before = [int(e) for e in ids[token, layer - 1] if e >= 0] if layer else []
        for e in before:
            where = [slot // (slots // nodes) for slot in range(slots) if table[layer - 1, slot] == e]
            home = where[(token + e) % len(where)]
            served = [serving(layer, f, home, token) for f in picks]
            stay += (len(set(served) - {home}) + len(set(served)) - 1) / 2 / len(before)
    total = found.copies.sum(axis=(0, 1))
    assert total == pytest.approx([normal, single, by_request, stay])
    assert found.tokens.sum() == tokens * layers


def test_without_replicas_copies_are_the_visits_of_other_nodes() -> None:
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(16)[:4] for _ in range(200)])
    row = rng.permutation(16)
    placement = ExpertPlacement(row[None], np.arange(1), 16, 8, 1)
    home = np.empty(16, dtype=np.int64)
    home[row] = np.arange(16) // 2
    _, by_node = visits_from_ids(ids, home, 8, 4)
    picks = TokenPicks(ids[:, None].astype(np.int16), np.zeros(200, np.int64), True)
    found = count_copies(placement, picks, nodes=4, replica="equal", blocks=1).mean()
    assert found["normal"] == pytest.approx(by_node.sum() / 200 * 3 / 4)
    assert found["low_latency"] == pytest.approx(3.0)


@pytest.fixture(scope="module")
def layouts() -> np.ndarray:
    """All 8! / (2!^4) ways to put 8 experts on four ranks, two each. [2520, 8]"""
    rows = np.asarray(list(itertools.permutations(range(8))))
    return rows[(rows[:, ::2] < rows[:, 1::2]).all(axis=1)]


# A second of annealing each.
SEEDS = range(30 if os.environ.get("MOESIM_WHOLE") else 8)


@pytest.mark.parametrize("seed", SEEDS)
def test_small_cases_reach_the_best_grouping_within_the_bound(seed: int, layouts: np.ndarray) -> None:
    """Two nodes of two ranks, 8 experts: what stays together is within 1 % of the best of all layouts."""
    rng = np.random.default_rng(seed)
    loads = rng.lognormal(0.0, 0.5, 8)
    loads /= loads.sum()
    together = rng.random((8, 8)) ** 3
    together = together + together.T
    np.fill_diagonal(together, 0.0)
    asked = PlacementRequest(
        loads[None, None], np.ones(1), np.arange(1), 1, slots=8, ranks=4, nodes=2, coactivation=together[None]
    )
    start = solve(asked, "greedy").placement.rank_loads(loads[None])[0] * 4
    hottest, above = max(start.max(), 1.001) + 1e-9, np.maximum(start - 1.001, 0.0).sum() + 1e-9

    def even(ranks: np.ndarray) -> np.ndarray:
        """Of loads [layouts, ranks]: which are no less even than greedy's."""
        return (ranks.max(axis=1) <= hottest) & (np.maximum(ranks - 1.001, 0.0).sum(axis=1) <= above)

    def kept(rows: np.ndarray) -> np.ndarray:
        """Of rows [layouts, slots]: what stays inside their nodes."""
        parts = rows.reshape(-1, 2, 4)
        return together[parts[..., :, None], parts[..., None, :]].sum(axis=(1, 2, 3)) / 2

    best = kept(layouts[even(loads[layouts].reshape(-1, 4, 2).sum(axis=2) * 4)]).max()
    found = solve(asked, "affinity").placement
    assert even(found.rank_loads(loads[None]) * 4).all()
    assert kept(found.physical_to_logical) >= 0.99 * best
