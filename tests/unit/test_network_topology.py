"""The fabric's graph: paths by hand, and bytes that are conserved."""

from __future__ import annotations

from itertools import pairwise

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import BadInput
from moesim.network.topology import build
from moesim.spec.cluster import ClusterSpec, GpuSpec

GPU = GpuSpec(name="g", hbm_bytes=1e9, hbm_bytes_per_s=1e12, flops_per_s={"bf16": 1e15}, multiprocessors=100)


def cluster(nodes=2, gpus_per_node=2, domain=0):
    return ClusterSpec(
        name="c",
        gpu=GPU,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        nvlink_bytes_per_s=100.0,
        nic_bytes_per_s=10.0,
        pcie_bytes_per_s=20.0,
        nvlink_latency_s=2.0,
        nic_latency_s=6.0,
        nvlink_domain_gpus=domain,
    )


def test_paths_by_hand():
    spine = build(cluster())
    assert spine.path(1, 1) == ["gpu1"]
    assert spine.path(0, 1) == ["gpu0", "nvswitch0", "gpu1"]
    assert spine.path(0, 2) == ["gpu0", "nic0", "leaf0", "nic2", "gpu2"]
    assert spine.path(0, 3) == ["gpu0", "nic0", "leaf0", "spine", "leaf1", "nic3", "gpu3"]
    sender = build(cluster(), crossing="sender")
    assert sender.path(0, 3) == ["gpu0", "nvswitch0", "gpu1", "nic1", "leaf1", "nic3", "gpu3"]
    receiver = build(cluster(), crossing="receiver")
    assert receiver.path(0, 3) == ["gpu0", "nic0", "leaf0", "nic2", "gpu2", "nvswitch1", "gpu3"]
    assert (spine.path_latency_s(0, 1), spine.path_latency_s(0, 3), sender.path_latency_s(0, 3)) == (2.0, 6.0, 8.0)
    assert spine.path_latency_s(1, 1) == 0.0


def test_a_domain_of_several_nodes_needs_no_nic_inside():
    rack = build(cluster(nodes=4, gpus_per_node=2, domain=4))
    assert rack.path(0, 3) == ["gpu0", "nvswitch0", "gpu3"]
    assert rack.path(3, 5) == ["gpu3", "nic3", "leaf1", "nic5", "gpu5"]
    whole = build(cluster(nodes=4, gpus_per_node=2, domain=72))
    assert set(whole.graph) == {f"gpu{gpu}" for gpu in range(8)} | {"nvswitch0"}


def test_link_bytes_and_the_busiest_link_by_hand():
    topology = build(cluster(), oversubscription=4.0)
    pairs = np.zeros((4, 4))
    pairs[0, 0] = 1e6  # stays
    pairs[0, 1], pairs[0, 2], pairs[0, 3] = 300.0, 40.0, 30.0
    found = topology.link_bytes(pairs)
    assert found[("gpu0", "nvswitch0")] == 300.0
    assert found[("gpu0", "nic0")] == found[("nic0", "leaf0")] == 70.0
    assert found[("leaf0", "nic2")] == 40.0
    assert found[("leaf0", "spine")] == found[("spine", "leaf1")] == 30.0
    assert ("gpu1", "nvswitch0") not in found
    busiest = topology.busiest(pairs)
    assert busiest is not None
    # 70 bytes over the NIC's 10 bytes/s; the spine's uplink carries 30 at 2 x 10 / 4.
    assert (busiest.link, busiest.bytes, busiest.seconds) == (("nic0", "leaf0"), 70.0, 7.0)
    assert topology.endpoint_s(pairs).tolist() == [7.0, 3.0, 4.0, 3.0]
    slow = build(cluster(), oversubscription=10.0).busiest(pairs)
    assert slow is not None and slow.link == ("leaf0", "spine") and slow.seconds == 15.0
    assert topology.busiest(np.zeros((4, 4))) is None


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from(["spine", "sender", "receiver"]), st.integers(0, 2**32))
def test_bytes_are_conserved_at_every_vertex(nodes, gpus_per_node, crossing, seed):
    topology = build(cluster(nodes, gpus_per_node), crossing=crossing)
    gpus = nodes * gpus_per_node
    pairs = np.random.default_rng(seed).integers(0, 100, (gpus, gpus)).astype(float)
    np.fill_diagonal(pairs, 0.0)
    found = topology.link_bytes(pairs)
    assert all(topology.graph.has_edge(*edge) for edge in found)
    for vertex in topology.graph:
        into = sum(size for (_, end), size in found.items() if end == vertex)
        out = sum(size for (start, _), size in found.items() if start == vertex)
        gpu = int(vertex.removeprefix("gpu")) if vertex.startswith("gpu") else None
        born = 0.0 if gpu is None else pairs[gpu].sum() - pairs[:, gpu].sum()
        assert out - into == born
    busiest = topology.busiest(pairs)
    if busiest is not None:
        assert busiest.seconds >= topology.endpoint_s(pairs).max() * (1 - 1e-12)


def test_paths_are_paths_of_the_graph_and_none_shorter_leaves_out_a_switch():
    topology = build(cluster(3, 4))
    for source in range(12):
        lengths = nx.single_source_shortest_path_length(topology.graph, f"gpu{source}")
        for destination in range(12):
            vertices = topology.path(source, destination)
            assert all(topology.graph.has_edge(*edge) for edge in pairwise(vertices))
            assert len(set(vertices)) == len(vertices)
            assert len(vertices) - 1 == lengths[f"gpu{destination}"]


def test_bad_input_is_named():
    with pytest.raises(BadInput, match=r"oversubscription of 0\.5"):
        build(cluster(), oversubscription=0.5)
    with pytest.raises(BadInput, match="split nodes"):
        build(cluster(nodes=4, gpus_per_node=4, domain=6))
    with pytest.raises(BadInput, match="left unused"):
        build(cluster(), crossing="sender", inside="network")
    topology = build(cluster())
    with pytest.raises(BadInput, match="GPU 4 of a cluster of 4"):
        topology.path(0, 4)
    with pytest.raises(BadInput, match="give \\[gpus, gpus\\]"):
        topology.link_bytes(np.zeros((3, 4)))
    with pytest.raises(BadInput, match="negative or not finite"):
        topology.link_bytes(np.full((4, 4), -1.0))


LAYOUT = {"gpu_nic": (0, 0, 1, 1), "gpu_switch": (0, 0, 1, 1), "nic_switch": (0, 1), "switch_socket": (0, 1)}


def box(layout=None, **changes):
    base = cluster(nodes=2, gpus_per_node=4)
    return ClusterSpec.read({**base.model_dump(), "node": layout or {}, **changes}, where="c")


def test_gpus_share_a_nic():
    shared = build(box({"gpu_nic": (0, 0, 1, 1)}))
    assert shared.path(1, 4) == ["gpu1", "nic0", "leaf0", "nic2", "gpu4"]
    pairs = np.zeros((8, 8))
    pairs[0, 4], pairs[1, 5] = 30.0, 20.0
    busiest = shared.busiest(pairs)
    assert busiest is not None and (busiest.link, busiest.seconds) == (("nic0", "leaf0"), 5.0)
    assert shared.endpoint_s(pairs).tolist() == [5.0, 5.0, 0.0, 0.0, 5.0, 5.0, 0.0, 0.0]
    relayed = build(box({"gpu_nic": (0, 0, 1, 1)}), crossing="sender")
    assert relayed.path(0, 7) == ["gpu0", "nvswitch0", "gpu3", "nic1", "leaf1", "nic3", "gpu7"]
    assert relayed.relay(2, 1) == 2 and relayed.relay(7, 0) == 4


def test_a_wrong_pair_crosses_the_sockets():
    right = build(box(LAYOUT))
    assert right.path(0, 4) == ["gpu0", "pcie0", "nic0", "leaf0", "nic2", "pcie2", "gpu4"]
    wrong = build(box({**LAYOUT, "gpu_nic": (1, 1, 0, 0)}, socket_bytes_per_s=4.0))
    up = ["gpu0", "pcie0", "socket0", "socket1", "pcie1", "nic1", "leaf1"]
    assert wrong.path(0, 4) == [*up, "nic3", "pcie3", "socket3", "socket2", "pcie2", "gpu4"]
    pairs = np.zeros((8, 8))
    pairs[0, 4] = 40.0
    found, best = wrong.busiest(pairs), right.busiest(pairs)
    assert found is not None and best is not None
    assert (found.link, found.seconds, best.seconds) == (("socket0", "socket1"), 10.0, 4.0)


def test_a_box_without_nvlink_meets_over_pcie():
    plain = build(box(nvlink_bytes_per_s=0.0, pcie_latency_s=3.0))
    assert plain.path(0, 3) == ["gpu0", "pcie0", "gpu3"]
    assert plain.path(0, 4) == ["gpu0", "nic0", "leaf0", "nic4", "gpu4"]
    assert (plain.path_latency_s(0, 3), plain.path_latency_s(0, 4)) == (3.0, 6.0)
    tree = build(box(LAYOUT, nvlink_bytes_per_s=0.0, nodes=1))
    assert tree.path(0, 1) == ["gpu0", "pcie0", "gpu1"]
    assert tree.path(0, 2) == ["gpu0", "pcie0", "socket0", "socket1", "pcie1", "gpu2"]
    assert "nic0" not in tree.graph
    pairs = np.zeros((4, 4))
    pairs[0, 2] = pairs[1, 3] = 20.0
    busiest = tree.busiest(pairs)  # both pass the switch's one uplink
    assert busiest is not None and (busiest.link, busiest.bytes) == (("pcie0", "socket0"), 40.0)


def test_without_rails_every_node_has_its_leaf():
    flat = build(box(rails=False, oversubscription=2.0))
    assert flat.path(0, 5) == ["gpu0", "nic0", "leaf0", "spine", "leaf1", "nic5", "gpu5"]
    assert flat.graph.edges["leaf0", "spine"]["bytes_per_s"] == 4 * 10.0 / 2.0
    units = build(box(nodes=4, nodes_per_leaf=2))
    assert units.path(0, 4) == ["gpu0", "nic0", "leaf0", "nic4", "gpu4"]
    assert units.path(0, 8) == ["gpu0", "nic0", "leaf0", "spine", "leaf4", "nic8", "gpu8"]


def test_the_network_inside_a_node():
    over_nics = build(box(nodes=1), inside="network")
    assert over_nics.path(0, 1) == ["gpu0", "nic0", "leaf0", "spine", "leaf1", "nic1", "gpu1"]
    shared = build(box({"gpu_nic": (0, 0, 1, 1)}, nodes=1), inside="network")
    assert shared.path(0, 1) == ["gpu0", "nic0", "gpu1"]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([{}, {"gpu_nic": (0, 0, 1, 1)}, LAYOUT, {**LAYOUT, "gpu_nic": (1, 0, 1, 0)}]),
    st.sampled_from([("spine", "links"), ("spine", "network"), ("sender", "links"), ("receiver", "links")]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_every_layout_has_its_paths_and_both_ways_of_counting_agree(layout, way, nvlink, rails, seed):
    spec = box(layout, rails=rails, oversubscription=3.0, nvlink_bytes_per_s=100.0 if nvlink else 0.0, nodes=3)
    topology = build(spec, crossing=way[0], inside=way[1])
    for source in range(12):
        for destination in range(12):
            assert all(topology.graph.has_edge(*edge) for edge in pairwise(topology.path(source, destination)))
    pairs = np.random.default_rng(seed).integers(0, 100, (2, 12, 12)).astype(float)
    one, other = topology.busiest(pairs[0]), topology.busiest(pairs[1])
    assert one is not None and other is not None
    assert topology.busiest_s(pairs) == pytest.approx([one.seconds, other.seconds], rel=1e-12)
