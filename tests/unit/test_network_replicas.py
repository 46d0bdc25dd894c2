"""Replica choice by hand and by counting every source rank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import BadInput
from moesim.network.replicas import replica_shares
from moesim.spec.plan import ExpertPlacement


def placement(rows: list[list[int]], ranks: int) -> ExpertPlacement:
    table = np.asarray(rows, dtype=np.int64)
    return ExpertPlacement(table, np.arange(len(rows)), int(table.max()) + 1, ranks, len(rows))


def counted(plan: ExpertPlacement, nodes: int) -> np.ndarray:
    """The same by walking over source ranks."""
    shares = np.zeros(plan.physical_to_logical.shape)
    rank_of = np.arange(plan.slots) // plan.slots_per_rank
    node_of = rank_of // (plan.ranks // nodes)
    for layer, row in enumerate(plan.physical_to_logical):
        for expert in range(plan.experts):
            slots = np.nonzero(row == expert)[0]
            for node in range(nodes):
                near = slots[node_of[slots] == node]
                chosen = near if len(near) else slots
                shares[layer, chosen] += 1.0 / nodes / len(chosen)
    return shares


def test_a_node_keeps_its_tokens() -> None:
    # Expert 0 has two replicas on node 0 and one on node 1; nodes 2 and 3 have none.
    plan = placement([[0, 1, 0, 2, 0, 3, 4, 5]], ranks=8)
    shares = replica_shares(plan, policy="local_first", nodes=4)[0]
    assert shares[0] == pytest.approx((1 / 1 + 1 / 3) / 4)
    plan = placement([[0, 0, 1, 2, 0, 3, 4, 5]], ranks=8)
    shares = replica_shares(plan, policy="local_first", nodes=4)[0]
    assert shares[[0, 1, 4]] == pytest.approx([(1 / 2 + 2 / 3) / 4] * 2 + [(1 + 2 / 3) / 4])
    assert replica_shares(plan, policy="equal", nodes=4)[0][[0, 1, 4]] == pytest.approx([1 / 3] * 3)


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 4]))
def test_shares_are_those_of_walking_over_the_ranks(seed: int, nodes: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.concatenate([np.arange(10), rng.integers(0, 10, 6)])).tolist() for _ in range(2)]
    plan = placement(rows, ranks=8)
    shares = replica_shares(plan, policy="local_first", nodes=nodes)
    assert shares == pytest.approx(counted(plan, nodes))
    whole = np.zeros((2, 10))
    np.add.at(whole, (np.arange(2)[:, None], plan.physical_to_logical), shares)
    assert whole == pytest.approx(np.ones((2, 10)))


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(BadInput, match="local_first"):
        replica_shares(placement([[0, 1]], ranks=2), policy="nearest", nodes=1)
