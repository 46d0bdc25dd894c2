"""Copies under uniform routing: by hand, and against routing drawn as benchmarks draw it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import BadInput
from moesim.network.uniform import COPY_SCHEMES, Routed, uniform_copies, visited

V3 = Routed(top_k=8, experts=256)


def test_by_hand() -> None:
    assert visited(1, 256, 8) == 1.0
    assert visited(2, 4, 2) == pytest.approx(2 * (1 - 2 / 4 * 1 / 3))  # two of four experts, two to a bin
    expert = uniform_copies("expert", V3, ranks=32, domain=8)
    assert (expert.nic, expert.nvlink, expert.domains, expert.peers) == (6.0, 8 / 4 - 8 / 32, 4, 31)
    network = uniform_copies("expert_network", V3, ranks=8, domain=8)
    assert (network.nic, network.nvlink) == (7.0, 0.0)
    peer = uniform_copies("peer", V3, ranks=32, domain=8)
    assert (peer.nic, peer.nvlink) == (24.0, 7.0)
    node = uniform_copies("node", V3, ranks=8, domain=72)
    assert (node.nic, node.nvlink, node.peers) == (0.0, visited(8, 256, 8) * 7 / 8, 7)


def test_a_perfect_router_visits_as_many_ranks_as_it_can() -> None:
    routed = Routed(top_k=8, experts=256, balanced=True)
    assert [uniform_copies("node", routed, ranks=ranks, domain=72).ranks for ranks in (4, 8, 64)] == [4.0, 8.0, 8.0]


@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_against_routing_drawn_under_groups(nodes: int) -> None:
    """Scores at random, the 4 domains with the best experts, the 8 best experts of those: DeepEP's own test."""
    generator = np.random.default_rng(nodes)
    scores = generator.random((4000, 256))
    best = scores.reshape(4000, nodes, -1).max(axis=-1)
    kept = best >= np.sort(best, axis=-1)[:, -min(nodes, 4)][:, None]
    masked = np.where(np.repeat(kept, 256 // nodes, axis=-1), scores, -1.0)
    picked = np.argsort(-masked, axis=-1)[:, :8]
    seen = [np.mean([len(set(row)) for row in picked // (256 // parts)]) for parts in (8 * nodes, nodes)]
    copies = uniform_copies("node", Routed(top_k=8, experts=256, top_groups=4), ranks=8 * nodes, domain=8)
    assert [copies.ranks, copies.visited_domains] == pytest.approx(seen, rel=0.02)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(COPY_SCHEMES), st.integers(1, 200), st.sampled_from([1, 4, 8, 72]), st.integers(1, 9), st.booleans()
)
def test_copies_are_conserved(scheme, ranks, domain, top_k, local) -> None:
    routed = Routed(top_k=top_k, local_experts=8) if local else Routed(top_k=top_k, experts=256)
    copies = uniform_copies(scheme, routed, ranks=ranks, domain=domain)
    assert copies.nic >= 0.0 and copies.nvlink >= 0.0 and copies.peers >= 0
    if scheme.startswith("expert"):  # each pick, but for those that stay on their rank
        assert copies.nic + copies.nvlink == pytest.approx(top_k * (1 - 1 / ranks))
    assert 1.0 - 1e-9 <= copies.ranks <= min(ranks, top_k) + 1e-9
    assert copies.visited_domains <= copies.ranks + 1e-9


def test_bad_input_is_named() -> None:
    with pytest.raises(BadInput, match="give one of them"):
        Routed(top_k=8)
    with pytest.raises(BadInput, match="0 ranks"):
        uniform_copies("node", V3, ranks=0, domain=8)
