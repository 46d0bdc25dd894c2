"""Moves and pauses of a new placement, worked out by hand: two ranks, three experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moesim.cost.links import NIC_FRACTION, NVLINK_FRACTION
from moesim.engine.deployment import Deployment, groundwork, resolve
from moesim.engine.relayout_moves import match_ranks, move_time, pair_bytes, plan_moves
from moesim.graph.priced_step import LayerSetup
from moesim.network.instance import InstanceNetwork
from moesim.spec.parallel import ParallelSpec
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import Scenario
from tests.scenarios import small

# OLMoE: three matrices of 2,048 x 1,024 in bf16.
EXPERT_BYTES = 3 * 2048 * 1024 * 2


def placed(rows: list[list[int]], *, experts: int = 3, ranks: int = 2) -> ExpertPlacement:
    """A placement whose rows are the slots of each layer."""
    return ExpertPlacement(np.asarray(rows), np.arange(len(rows)), experts, ranks, len(rows))


def instance(gpus: int, per_node: int, **parallel: int) -> Deployment:
    """OLMoE on a few GPUs; its placement is replaced by the test's."""
    size: dict[str, Any] = {"system": "h200_sxm", "nodes": gpus // per_node, "gpus_per_node": per_node}
    plan = {"attention_dp": gpus, "ep": gpus, **parallel}
    placement = {"solver": "contiguous", "redundant_experts": 0}
    return resolve(groundwork(Scenario.read(small(cluster=size, parallel=plan, placement=placement), where="test")))


def network_of(setup: LayerSetup) -> InstanceNetwork:
    assert setup.network is not None
    return setup.network


def test_two_ranks_swap_an_expert_and_keep_the_third() -> None:
    old, new = placed([[0, 1, 2, 0]]), placed([[0, 2, 1, 0]])
    moves = plan_moves(old, new, domains=[0, 0])
    assert list(zip(moves.layer, moves.expert, moves.source, moves.destination, strict=True)) == [
        (0, 1, 0, 1),  # only rank 0 had expert 1
        (0, 2, 1, 0),  # only rank 1 had expert 2; expert 0 is on both before and after
    ]
    assert moves.copies.tolist() == [[0, 0]]
    # Where what stays changes its slot, engines copy it there: expert 0 on both ranks.
    assert plan_moves(old, placed([[2, 0, 0, 1]]), domains=[0, 0]).copies.tolist() == [[1, 1]]


def test_an_expert_with_two_slots_on_a_rank_travels_once_and_is_copied() -> None:
    moves = plan_moves(placed([[0, 1, 2, 0]]), placed([[2, 2, 1, 0]]), domains=[0, 0])
    assert moves.destination[moves.expert == 2].tolist() == [0]
    assert moves.copies.tolist() == [[1, 0]]
    held = plan_moves(placed([[0, 1, 2, 0]]), placed([[0, 1, 2, 2]]), domains=[0, 0])  # a second copy of its own
    assert held.count == 0
    assert held.copies.tolist() == [[0, 1]]


def test_the_nearest_holder_sends_and_receivers_are_dealt_over_holders() -> None:
    old = placed([[0, 1, 1, 2]], ranks=4)
    moves = plan_moves(old, placed([[1, 0, 2, 1]], ranks=4), domains=[0, 0, 1, 1])
    sent = {(int(e), int(d)): int(s) for e, s, d in zip(moves.expert, moves.source, moves.destination, strict=True)}
    # Rank 0 takes expert 1 from rank 1 (its node), rank 3 from rank 2 (its node).
    assert sent == {(1, 0): 1, (0, 1): 0, (2, 2): 3, (1, 3): 2}
    far = plan_moves(placed([[0, 0, 1, 2]], ranks=4), placed([[1, 2, 0, 0]], ranks=4), domains=[0, 0, 1, 1])
    assert far.source[far.expert == 0].tolist() == [0, 1]  # each of the two holders serves one of the two


def test_the_pause_is_what_the_busiest_link_and_the_copy_take() -> None:
    deployment = instance(2, 2)
    cluster, network = deployment.ground.cluster, network_of(deployment.setup)
    old = placed([[0, 1, 2, 0], [0, 1, 2, 0]])
    new = placed([[0, 2, 1, 0], [0, 1, 2, 0]])  # the second layer stays
    setup = replace(deployment.setup, placement=old)
    moves = plan_moves(old, new, domains=[0, 0])
    assert pair_bytes(moves, setup).tolist() == [[[0, EXPERT_BYTES], [EXPERT_BYTES, 0]], [[0, 0], [0, 0]]]
    timed = move_time(moves, setup, network, cluster.gpu.hbm_bytes_per_s)
    rate = cluster.nvlink_bytes_per_s * NVLINK_FRACTION
    assert timed.transfer_s == pytest.approx([cluster.nvlink_latency_s + EXPERT_BYTES / rate, 0.0])
    assert timed.copy_s == pytest.approx([2 * EXPERT_BYTES / cluster.gpu.hbm_bytes_per_s, 0.0])
    assert timed.bytes_by_level == {"inside": 2 * EXPERT_BYTES, "between": 0.0}
    assert timed.copied_bytes == 0
    turned = plan_moves(old, placed([[1, 0, 2, 0], [0, 1, 2, 0]]), domains=[0, 0])  # rank 0 turns its two around
    copied = move_time(turned, setup, network, cluster.gpu.hbm_bytes_per_s)
    assert copied.transfer_s.tolist() == [0.0, 0.0]
    assert copied.copy_s == pytest.approx([4 * EXPERT_BYTES / cluster.gpu.hbm_bytes_per_s, 0.0])
    assert copied.copied_bytes == 2 * EXPERT_BYTES


def test_between_nodes_the_nic_sets_the_pace() -> None:
    deployment = instance(2, 1)
    setup = replace(deployment.setup, placement=placed([[0, 1, 2, 0]]))
    network = network_of(setup)
    moves = plan_moves(setup.placement, placed([[2, 0, 0, 1]]), domains=[0, 1])
    timed = move_time(moves, setup, network, deployment.ground.cluster.gpu.hbm_bytes_per_s)
    seconds = network.cluster.nic_latency_s + EXPERT_BYTES / (network.cluster.nic_bytes_per_s * NIC_FRACTION)
    assert timed.transfer_s == pytest.approx([seconds])
    assert timed.bytes_by_level == {"inside": 0.0, "between": 2 * EXPERT_BYTES}


def test_gpus_that_share_an_expert_each_send_their_part() -> None:
    deployment = instance(4, 4)
    parallel = ParallelSpec(attention_dp=4, ep=2, expert_tp=2)
    setup = replace(deployment.setup, placement=placed([[0, 1, 2, 0]]), parallel=parallel)
    pairs = pair_bytes(plan_moves(setup.placement, placed([[2, 0, 0, 1]]), domains=[0, 0]), setup)[0]
    half = EXPERT_BYTES / 2
    wanted = np.zeros((4, 4))
    wanted[0, 2] = wanted[1, 3] = wanted[2, 0] = wanted[3, 1] = half
    assert pairs.tolist() == wanted.tolist()


def test_parts_are_matched_to_the_ranks_that_hold_most_of_them() -> None:
    old = placed([[0, 1, 2, 3]], experts=4)
    swapped = placed([[2, 3, 0, 1]], experts=4)
    assert match_ranks(old, swapped, [0, 0]).physical_to_logical.tolist() == old.physical_to_logical.tolist()
    assert match_ranks(old, swapped, [0, 1]).physical_to_logical.tolist() == [[2, 3, 0, 1]]  # each its own node
