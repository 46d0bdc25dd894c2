"""Collectives by formula, against figures worked out by hand and against each other."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.cost.ops import Collective
from moesim.errors import BadInput
from moesim.network import collectives
from moesim.spec.cluster import ClusterSpec, GpuSpec

GPU = GpuSpec(name="g", hbm_bytes=1e9, hbm_bytes_per_s=1e12, flops_per_s={"bf16": 1e15}, multiprocessors=100)
# Round figures: a message of 1 s, 4 bytes/s over NVLink; 10 s and 1 byte/s over the NIC.
CLUSTER = ClusterSpec(
    name="c",
    gpu=GPU,
    nodes=2,
    gpus_per_node=4,
    nvlink_bytes_per_s=4.0,
    nic_bytes_per_s=1.0,
    pcie_bytes_per_s=8.0,
    nvlink_latency_s=1.0,
    nic_latency_s=10.0,
)


@pytest.mark.parametrize(
    ("formula", "ranks", "seconds"),
    [
        # 64 bytes at 4 bytes/s are 16 s.
        (collectives.all_reduce_ring, 8, 2 * 7 * 1.0 + 2 * 7 / 8 * 16),
        (collectives.all_reduce_tree, 8, 2 * 3 * 1.0 + 2 * 16),
        (collectives.all_reduce_tree, 5, 2 * 3 * 1.0 + 2 * 16),
        (collectives.all_gather_ring, 8, 7 * 1.0 + 7 / 8 * 16),
        (collectives.reduce_scatter_ring, 4, 3 * 1.0 + 3 / 4 * 16),
        (collectives.all_to_all_pairwise, 8, 7 * 1.0 + 7 / 8 * 16),
        (collectives.all_reduce_ring, 1, 0.0),
        (collectives.all_reduce_tree, 1, 0.0),
        (collectives.all_gather_ring, 1, 0.0),
    ],
)
def test_one_link_by_hand(formula, ranks, seconds):
    assert formula(64.0, ranks, 1.0, 4.0) == seconds
    assert formula(np.full((2, 3), 64.0), ranks, 1.0, 4.0).tolist() == [[seconds] * 3] * 2


def test_all_to_all_over_two_nodes_by_hand():
    # 64 bytes, 8 ranks: 8 bytes to each. NVLink: 3 peers of 1 + 8/4 s; NIC: 4 peers of 10 + 8/1 s, at once.
    assert collectives.all_to_all_flat(64.0, CLUSTER, 8) == max(3 * 3.0, 4 * 18.0)
    # Two levels: 3 messages of 16 bytes over NVLink, then 1 of 32 bytes over the NIC.
    assert collectives.all_to_all_two_level(64.0, CLUSTER, 8) == 3 * (1 + 16 / 4) + 1 * (10 + 32 / 1)
    # Within a node both are the pairwise exchange over NVLink.
    pairwise = collectives.all_to_all_pairwise(64.0, 4, 1.0, 4.0)
    assert collectives.all_to_all_flat(64.0, CLUSTER, 4) == pairwise
    assert collectives.all_to_all_two_level(64.0, CLUSTER, 4) == pairwise
    with pytest.raises(BadInput, match="6 GPUs do not fill NVLink domains of 4"):
        collectives.all_to_all_flat(64.0, CLUSTER, 6)


def test_two_levels_win_where_messages_are_small():
    small, large = 8.0, 8e4
    assert collectives.all_to_all_two_level(small, CLUSTER, 8) < collectives.all_to_all_flat(small, CLUSTER, 8)
    assert collectives.all_to_all_two_level(large, CLUSTER, 8) > collectives.all_to_all_flat(large, CLUSTER, 8)


@pytest.mark.parametrize(
    ("kind", "factor"), [("all_reduce", 1.75), ("all_gather", 0.875), ("reduce_scatter", 0.875), ("all_to_all", 0.875)]
)
def test_bus_bandwidth_is_the_link_rate_where_latency_is_nothing(kind, factor):
    assert collectives.bus_factor(kind, 8) == factor
    formula = {
        "all_reduce": collectives.all_reduce_ring,
        "all_gather": collectives.all_gather_ring,
        "reduce_scatter": collectives.reduce_scatter_ring,
        "all_to_all": collectives.all_to_all_pairwise,
    }[kind]
    seconds = formula(1e9, 8, 0.0, 4.5e11)
    np.testing.assert_allclose(collectives.bus_bandwidth(kind, 1e9, seconds, 8), 4.5e11, rtol=1e-12)


def test_a_collective_takes_the_link_that_it_spans_and_the_better_algorithm():
    small = Collective(kind="all_reduce", bytes=np.array([1e-3]), gpus=4, nodes=1)
    np.testing.assert_allclose(collectives.seconds(small, CLUSTER), collectives.all_reduce_tree([1e-3], 4, 1.0, 4.0))
    large = Collective(kind="all_reduce", bytes=np.array([1e6]), gpus=8, nodes=2)
    np.testing.assert_allclose(collectives.seconds(large, CLUSTER), collectives.all_reduce_ring([1e6], 8, 10.0, 1.0))
    gather = Collective(kind="all_gather", bytes=np.array([64.0]), gpus=8, nodes=2)
    np.testing.assert_allclose(collectives.seconds(gather, CLUSTER), [7 * 10 + 7 / 8 * 64])
    exchange = Collective(kind="all_to_all", bytes=np.array([64.0]), gpus=8, nodes=2)
    np.testing.assert_allclose(collectives.seconds(exchange, CLUSTER), [57.0])


def test_no_ranks_is_refused():
    with pytest.raises(BadInput, match="a collective of 0 ranks"):
        collectives.all_reduce_ring(1.0, 0, 1.0, 1.0)
