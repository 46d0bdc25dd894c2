"""Exchanges by hand, against the closed formulas of collectives, and against the busiest link."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cost.estimate import Tag
from moesim.errors import BadInput
from moesim.network.collectives import all_to_all_flat, all_to_all_two_level
from moesim.network.exchange import SCHEMES, prepare
from moesim.network.topology import build
from moesim.network.uniform import COPY_SCHEMES, Routed, uniform_copies
from moesim.spec.cluster import ClusterSpec, GpuSpec, MeasuredFigure, NodeLayout

GPU = GpuSpec(name="g", hbm_bytes=1e9, hbm_bytes_per_s=1e12, flops_per_s={"bf16": 1e15}, multiprocessors=100)
LAYOUTS = [
    NodeLayout(),
    NodeLayout(gpu_nic=(0, 0, 1, 1)),
    NodeLayout(gpu_nic=(1, 0, 1, 0), gpu_switch=(0, 0, 1, 1), nic_switch=(0, 1), switch_socket=(0, 1)),
]


def cluster(nodes=2, gpus_per_node=2, **changes):
    base = ClusterSpec(
        name="c",
        gpu=GPU,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        nvlink_bytes_per_s=100.0,
        nic_bytes_per_s=10.0,
        pcie_bytes_per_s=20.0,
        nvlink_latency_s=2.0,
        nic_latency_s=6.0,
        pcie_latency_s=3.0,
    )
    return base.model_copy(update=changes)


def pairs_of(*sizes, gpus=4):
    pairs = np.zeros((gpus, gpus))
    for source, destination, size in sizes:
        pairs[source, destination] = size
    return pairs


def test_flat_by_hand():
    found = prepare(cluster(), "flat").time(pairs_of((0, 1, 300.0), (0, 2, 40.0), (0, 3, 30.0), (1, 1, 9e9)))
    near, far = found.phases
    assert (near.level, float(near.latency_s), float(near.transfer_s)) == ("nvlink", 2.0, 3.0)
    assert (far.level, float(far.latency_s), float(far.transfer_s)) == ("nic", 12.0, 7.0)  # two messages, 70 bytes
    assert (found.order, float(found.seconds), found.tag) == ("at_once", 19.0, Tag.ASSUMED)


def test_two_level_by_hand():
    # 0 -> 3 goes to GPU 1 first (rail 1), then along it; 1 -> 2 goes to GPU 0 first.
    found = prepare(cluster(), "two_level").time(pairs_of((0, 3, 50.0), (1, 2, 20.0), (0, 1, 100.0)))
    gather, along, scatter = found.phases
    assert (float(gather.latency_s), float(gather.transfer_s)) == (2.0, 1.5)
    assert (float(along.latency_s), float(along.transfer_s)) == (6.0, 5.0)
    assert float(scatter.seconds) == 0.0
    assert float(found.seconds) == 14.5


def test_two_level_scatters_where_gpus_share_a_nic():
    spec = cluster(node=NodeLayout(gpu_nic=(0, 0)))
    found = prepare(spec, "two_level").time(pairs_of((1, 3, 50.0)))
    gather, along, scatter = found.phases  # 1 -> 0, 0 -> 2, 2 -> 3
    assert [float(phase.transfer_s) for phase in (gather, along, scatter)] == [0.5, 5.0, 0.5]


def test_deepep_normal_by_hand():
    # GPU 0 sends a token of 30 bytes to both GPUs of the other node: once over the rail, then forwarded to GPU 3.
    pairs = pairs_of((0, 2, 30.0), (0, 3, 30.0), (0, 1, 10.0))
    to_node = np.zeros((4, 2))
    to_node[0] = [10.0, 30.0]
    exchange = prepare(cluster(), "deepep_normal")
    found = exchange.time(pairs, to_node)
    rail, forward = found.phases
    assert (float(rail.latency_s), float(rail.transfer_s)) == (6.0, 3.0)
    assert (float(forward.latency_s), float(forward.transfer_s)) == (2.0, 0.3)
    assert (found.order, float(found.seconds)) == ("pipeline", 11.0)
    assert float(exchange.time(pairs).phases[0].transfer_s) == 6.0  # as if no token went to both
    back = exchange.time(pairs, to_node, backwards=True)
    assert float(back.seconds) == 11.0


def test_low_latency_by_hand():
    pairs = pairs_of((0, 1, 200.0), (0, 2, 40.0), (0, 3, 40.0))
    linked = prepare(cluster(), "deepep_low_latency").time(pairs)
    assert [float(phase.seconds) for phase in linked.phases] == [2.0 + 2.0, 6.0 + 8.0]  # one alpha for two messages
    assert float(linked.seconds) == 14.0
    network = prepare(cluster(), "deepep_low_latency_network").time(pairs)
    assert float(network.seconds) == 6.0 + 28.0


def test_a_measured_cluster_gives_a_formula_on_measured_figures():
    figure = MeasuredFigure(rel_sigma=0.1, points=3)
    measured = {"nic_bytes_per_s": figure, "nic_latency_s": figure}
    exchange = prepare(cluster(measured=measured), "flat")
    assert exchange.time(pairs_of((0, 2, 1.0))).tag == Tag.FORMULA
    assert exchange.time(pairs_of((0, 2, 1.0), (0, 1, 1.0))).tag == Tag.ASSUMED


@pytest.mark.parametrize(("nodes", "each"), [(1, 4), (2, 4), (4, 2), (3, 8)])
def test_an_even_load_takes_what_the_closed_formulas_say(nodes, each):
    spec = cluster(nodes, each)
    size = 640.0
    pairs = np.full((spec.gpus, spec.gpus), size / spec.gpus)
    flat = prepare(spec, "flat").time(pairs)
    assert float(flat.seconds) == pytest.approx(float(all_to_all_flat(size, spec, spec.gpus)))
    two = prepare(spec, "two_level").time(pairs)
    assert float(two.seconds) == pytest.approx(float(all_to_all_two_level(size, spec, spec.gpus)))


def test_pcie_that_carries_both_legs_is_the_busiest():
    spec = cluster(gpus_per_node=4, nvlink_bytes_per_s=0.0, node=LAYOUTS[2], nodes=2)
    pairs = pairs_of((0, 2, 100.0), (0, 4, 100.0), gpus=8)
    found = prepare(spec, "deepep_low_latency").time(pairs)
    assert float(found.seconds) >= 200.0 / 20.0  # GPU 0's PCIe link carries both
    assert found.phases[0].level == "pcie"


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SCHEMES),
    st.sampled_from(LAYOUTS),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_more_bytes_never_take_less_and_no_phase_beats_its_busiest_link(scheme, layout, nvlink, backwards, rails, seed):
    spec = cluster(
        3, 4, node=layout, rails=rails, nvlink_bytes_per_s=100.0 if nvlink else 0.0, oversubscription=2.0
    )  # fmt: skip
    exchange = prepare(spec, scheme)
    generator = np.random.default_rng(seed)
    less = generator.integers(0, 50, (2, 3, 12, 12)).astype(float) * (generator.random((2, 3, 12, 12)) < 0.3)
    more = less + generator.integers(0, 20, less.shape)
    one, other = exchange.time(less, backwards=backwards), exchange.time(more, backwards=backwards)
    assert one.seconds.shape == (2, 3)
    assert (other.seconds >= one.seconds * (1 - 1e-12)).all()
    assert np.allclose(exchange.time(less[1, 2], backwards=backwards).seconds, one.seconds[1, 2], rtol=1e-12)
    # A combine runs the same ways back, over links that are as fast in both directions.
    way = {"two_level": "sender", "deepep_normal": "receiver"}.get(scheme, "spine")
    bound = build(spec, crossing=way, inside=exchange.topology.inside)
    if not (layout.gpu_nic and scheme in ("two_level", "deepep_normal")):
        assert (one.seconds >= bound.busiest_s(less) * (1 - 1e-12)).all()
    assert all((one.seconds >= phase.transfer_s * (1 - 1e-12)).all() for phase in one.phases)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32))
def test_deepep_normal_moves_as_many_bytes_as_its_copies(nodes, each, seed):
    """Routed tokens: bytes over rails and NVLink are those of the copies that traffic counts."""
    from moesim.network.traffic import visits_from_ids

    generator = np.random.default_rng(seed)
    spec = cluster(nodes, each)
    gpus, experts = spec.gpus, spec.gpus * 2
    expert_to_rank = np.repeat(np.arange(gpus), 2)
    pairs, to_node = np.zeros((gpus, gpus)), np.zeros((gpus, nodes))
    for gpu in range(gpus):
        ids = np.stack([generator.permutation(experts)[:2] for _ in range(5)]).astype(np.int64)
        pairs[gpu], to_node[gpu] = visits_from_ids(ids, expert_to_rank, gpus, nodes)
    exchange = prepare(spec, "deepep_normal")
    (_, _, rail), (_, _, forward) = exchange._deepep_normal(pairs, to_node)
    home = np.arange(gpus) // each
    assert rail.sum() == to_node.sum() - to_node[np.arange(gpus), home].sum()
    assert forward.sum() == pairs.sum()


def test_bad_loads_are_named():
    exchange = prepare(cluster(), "deepep_normal")
    with pytest.raises(BadInput, match="unknown scheme 'ring'"):
        prepare(cluster(), "ring")
    with pytest.raises(BadInput, match=r"give \[\.\.\., gpus, gpus\]"):
        exchange.time(np.zeros((4, 3)))
    with pytest.raises(BadInput, match="negative or not finite"):
        exchange.time(np.full((4, 4), np.nan))
    with pytest.raises(BadInput, match="bytes to domains of shape"):
        exchange.time(np.ones((4, 4)), np.zeros((4, 3)))
    with pytest.raises(BadInput, match="count a token once"):
        exchange.time(np.ones((4, 4)), np.full((4, 2), 3.0))


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_uniform_copies_load_the_links_as_pairs_do(nodes):
    """The closed forms of uniform routing, and the same load as bytes of every pair, take the busiest link alike."""
    spec = cluster(nodes, 4, nic_latency_s=0.0, nvlink_latency_s=0.0)
    gpus, size = spec.gpus, 100.0
    routed = Routed(top_k=4, experts=2 * gpus)
    found = {scheme: uniform_copies(scheme, routed, ranks=gpus, domain=4) for scheme in COPY_SCHEMES}
    expert, node = found["expert"], found["node"]
    even = np.full((gpus, gpus), 4 * size / gpus)
    near, far = prepare(spec, "deepep_low_latency").time(even).phases
    assert float(near.transfer_s) == pytest.approx(size * expert.nvlink / 100.0)
    assert float(far.transfer_s) == pytest.approx(size * expert.nic / 10.0)
    pairs = np.full((gpus, gpus), node.ranks * size / gpus)
    to_node = np.full((gpus, nodes), node.visited_domains * size / nodes)
    rail, forward = prepare(spec, "deepep_normal").time(pairs, to_node).phases
    assert float(rail.transfer_s) == pytest.approx(size * node.nic / 10.0)
    assert float(forward.transfer_s) == pytest.approx(size * node.nvlink / 100.0)
