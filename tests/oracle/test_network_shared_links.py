"""Operations and other jobs on the links of a cluster, worked out by hand and by a plain piecewise fluid."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.engine import des, maxplus
from moesim.engine.links import Streams
from moesim.engine.linkuse import LinkUse, contended_flows, link_use, streams_of
from moesim.errors import BadInput
from moesim.graph.task import Link, Stream, Task, TaskGraph
from moesim.network.sharing import max_min
from moesim.network.topology import build
from moesim.spec.cluster import BackgroundSpec, ClusterSpec, GpuSpec, NodeLayout
from moesim.spec.presets import load_cluster
from moesim.spec.scenario import ClusterChoice
from tests.property.test_executors_agree import assert_same, random_graph

GPU = GpuSpec(name="toy", hbm_bytes=1e9, hbm_bytes_per_s=1e9, flops_per_s={"bf16": 1e12}, multiprocessors=1)
NIC, NVLINK, PCIE = 10.0, 100.0, 20.0


def cluster(nodes, each, *background, **changes):
    """NVLink of 100 bytes/s, NICs of 10, PCIe of 20, without latencies."""
    spec = {
        "name": "toy", "gpu": GPU, "nodes": nodes, "gpus_per_node": each, "nvlink_bytes_per_s": NVLINK,
        "nic_bytes_per_s": NIC, "pcie_bytes_per_s": PCIE, "background": background, **changes,
    }  # fmt: skip
    return ClusterSpec.model_validate(spec)


def stream(sender, receiver, bytes_per_s):
    return BackgroundSpec(kind="stream", gpus=(sender,), to=(receiver,), bytes_per_s=bytes_per_s)


def exchange(spec, pairs, seconds, ranks=None):
    """The time of one dispatch of `pairs` bytes between the first GPUs, which takes `seconds` alone."""
    topology = build(spec)
    ranks = ranks or len(pairs)
    whole = np.zeros((spec.gpus, spec.gpus))
    whole[:ranks, :ranks] = pairs
    task = Task(
        "dispatch", "dispatch", Stream.COMMUNICATION, np.full((1, 1), seconds), groups=np.zeros(ranks, np.int64)
    )
    graph = TaskGraph(1, ranks, (task,))
    use = link_use(graph, topology, {("dispatch", -1): [topology.link_loads(whole)[1]]}, streams_of(spec, topology))
    return float(des.run(graph, network=use).step_s[0])


def even(ranks, size):
    return size * (1.0 - np.eye(ranks))


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        (0.0001, 2.0 / (1.0 - 0.00001)),  # next to nothing
        (2.5, 2.0 / 0.75),  # a stream that wants a quarter gets it
        (5.0, 4.0),
        (10.0, 4.0),  # one that wants all gets half
    ],
)
def test_a_stream_of_kv_cache_takes_its_share_of_a_nic(asked, seconds):
    # Two nodes of one GPU: 20 bytes each way in 2 s keep both NICs busy.
    spec = cluster(2, 1, stream(0, 1, asked))
    assert exchange(spec, even(2, 20.0), 2.0) == pytest.approx(seconds, rel=1e-9)
    assert exchange(cluster(2, 1, stream(1, 0, asked)), even(2, 20.0), 2.0) == pytest.approx(seconds, rel=1e-9)


def test_a_link_that_is_used_little_is_not_slowed_by_a_heavy_stream():
    # GPU 0 sends 20 bytes in 2 s, GPU 1 only 4: a full stream beside the 4 leaves them their fifth.
    pairs = np.asarray([[0.0, 20.0], [4.0, 0.0]])
    assert exchange(cluster(2, 1, stream(1, 0, 10.0)), pairs, 2.0) == pytest.approx(2.0, rel=1e-9)
    assert exchange(cluster(2, 1, stream(0, 1, 10.0)), pairs, 2.0) == pytest.approx(4.0, rel=1e-9)


def test_gpus_that_share_a_nic_feel_each_others_streams():
    # Both GPUs of a node on one NIC: the exchange of GPUs 0 and 2 and a stream from 1 to 3 halve it.
    shared = {"node": NodeLayout(gpu_nic=(0, 0))}
    pairs = np.zeros((4, 4))
    pairs[0, 2] = 20.0
    assert exchange(cluster(2, 2, stream(1, 3, 10.0), **shared), pairs, 2.0) == pytest.approx(4.0, rel=1e-9)
    assert exchange(cluster(2, 2, stream(1, 3, 10.0)), pairs, 2.0) == pytest.approx(2.0, rel=1e-9)


def test_other_jobs_meet_on_an_oversubscribed_spine():
    # Two nodes of one GPU to a leaf, uplinks 2:1. GPU 0 to GPU 2 crosses the spine at 10 bytes/s, which is what its
    # leaf's uplink holds; a stream from GPU 1 to GPU 3 leaves it half.
    spec = {"rails": False, "nodes_per_leaf": 2, "oversubscription": 2.0}
    pairs = np.zeros((4, 4))
    pairs[0, 2] = 20.0
    assert exchange(cluster(4, 1, stream(1, 3, 10.0), **spec), pairs, 2.0) == pytest.approx(4.0, rel=1e-9)
    assert exchange(cluster(4, 1, stream(1, 3, 10.0), **spec | {"oversubscription": 1.0}), pairs, 2.0) == 2.0
    # Another job's all-to-all over GPUs 1 and 3 loads the uplink as much.
    job = BackgroundSpec(kind="all_to_all", gpus=(1, 3), bytes_per_s=10.0)
    assert exchange(cluster(4, 1, job, **spec), pairs, 2.0) == pytest.approx(4.0, rel=1e-9)
    # One over GPUs 0, 1 and 3 sends 2 bytes/s of each of the first two over the uplink: 4 of its 10.
    wide = BackgroundSpec(kind="all_to_all", gpus=(0, 1, 3), bytes_per_s=4.0)
    assert exchange(cluster(4, 1, wide, **spec), pairs, 2.0) == pytest.approx(2.0 / 0.6, rel=1e-9)


def test_pcie_is_shared_between_a_nodes_gpus_and_its_nics():
    # Without NVLink: GPU 0's way to its NIC and to GPU 1 both start on its PCIe link.
    layout = {"nvlink_bytes_per_s": 0.0, "node": NodeLayout(gpu_switch=(0, 0), nic_switch=(0, 0))}
    pairs = np.zeros((4, 4))
    pairs[0, 2] = 20.0  # 10 of PCIe's 20 bytes/s
    assert exchange(cluster(2, 2, stream(0, 1, 20.0), **layout), pairs, 2.0) == pytest.approx(2.0, rel=1e-9)
    pairs[0, 1] = 20.0  # now all of it
    assert exchange(cluster(2, 2, stream(0, 1, 20.0), **layout), pairs, 2.0) == pytest.approx(4.0, rel=1e-9)


def test_a_stream_that_is_held_up_elsewhere_leaves_the_rest():
    # Two streams out of GPU 1 halve its NIC, 5 each; the one to GPU 2 then takes 5 of the 10 that GPU 2 receives, so
    # the exchange into GPU 2 keeps 5 of its 10: progress 0.5. Asking for 4, it would lose nothing.
    into = np.zeros((4, 4))
    into[0, 2] = 20.0
    jobs = (stream(1, 2, 10.0), stream(1, 3, 10.0))
    assert exchange(cluster(4, 1, *jobs), into, 2.0) == pytest.approx(4.0, rel=1e-9)
    assert exchange(cluster(4, 1, *jobs), into, 5.0) == pytest.approx(5.0, rel=1e-9)


def test_a_prefetch_of_one_rank_slows_the_exchange_of_all():
    # As in docs/explanation/executors.md, over the cluster's links: rank 0 fetches over its NIC for 1 s alone.
    spec = cluster(2, 1)
    topology = build(spec)
    everyone = np.zeros(2, dtype=np.int64)
    nic = ((Link.NIC, 1.0),)
    tasks = (
        Task("dispatch", "dispatch", Stream.COMMUNICATION, np.array([[2.0]]), groups=everyone, links=nic),
        Task("prefetch", "prefetch", Stream.COPY, np.array([[1.0, 0.0]]), links=nic),
    )
    graph = TaskGraph(1, 2, tasks)
    found = des.run(graph, network=link_use(graph, topology, {}), timeline=True)
    np.testing.assert_allclose(found.end_s[:, 0], [[3.0, 3.0], [2.0, 0.0]], rtol=1e-9)
    host = TaskGraph(1, 2, (tasks[0], Task("load", "load", Stream.COPY, np.array([[9.0]]), links=((Link.PCIE, 1.0),))))
    assert des.run(host, network=link_use(host, topology, {})).step_s.tolist() == [9.0]  # not the NIC's


def test_links_of_a_rank_are_those_of_their_kind():
    """With PCIe switches drawn, NVLink is the way to the NVSwitch alone, and the NIC is reached over PCIe."""
    spec = cluster(2, 2, node=NodeLayout(gpu_switch=(0, 1), nic_switch=(0, 1), switch_socket=(0, 0)))
    topology = build(spec)
    graph = TaskGraph(1, 4, ())
    use = link_use(graph, topology, {})
    edges = [*topology.graph.edges]
    near = {edges[link] for link in use.own[Link.NVLINK][1]}
    assert near == {("gpu1", "nvswitch0"), ("nvswitch0", "gpu1")}
    way = {edges[link] for link in use.own[Link.NIC][1]}
    assert {("gpu1", "pcie1"), ("pcie1", "nic1"), ("nic1", "leaf1"), ("leaf1", "nic1")} <= way and len(way) == 6
    assert [link.tolist() for link in use.own[Link.PCIE]] == [[len(edges) + rank] for rank in range(4)]


def fluid(seconds, loads, capacity, streams):
    """The time of one collective, step by step: rates by `max_min`, until the next flow is over."""
    link = np.flatnonzero(loads)
    asked = np.minimum(loads[link] / seconds, capacity[link])
    left, now = np.full(len(link), seconds), 0.0
    crossed = np.zeros((len(streams.asked), len(capacity)))
    for number in range(len(streams.asked)):
        crossed[number, streams.link[streams.start[number] : streams.start[number + 1]]] = 1.0
    while len(left):
        usage = np.concatenate([np.eye(len(capacity))[link], crossed])
        rates = max_min(np.concatenate([asked, streams.asked]), usage, capacity)[: len(link)] / asked
        step = float((left / rates).min())
        now, left = now + step, left - step * rates
        kept = left > 1e-12 * seconds
        left, link, asked = left[kept], link[kept], asked[kept]
    return max(now, seconds)


@pytest.mark.parametrize("seed", range(60))
def test_random_loads_take_what_a_plain_fluid_takes(seed):
    rng = np.random.default_rng(seed)
    capacity = rng.uniform(5.0, 20.0, 6)
    loads = rng.uniform(0.0, 10.0, 6) * (rng.random(6) < 0.7)
    count = int(rng.integers(0, 5))
    crossed = [np.sort(rng.permutation(6)[: rng.integers(1, 4)]) for _ in range(count)]
    start = np.concatenate([[0], np.cumsum([len(one) for one in crossed])]).astype(np.int64)
    link = np.concatenate([*crossed, np.zeros(0)]).astype(np.int64)
    streams = Streams(rng.uniform(0.5, 25.0, count), start, link)
    seconds = float(rng.uniform(0.5, 1.5))
    tasks = [
        Task(f"d{layer}", "dispatch", Stream.COMMUNICATION, np.full((1, 1), seconds), groups=np.zeros(3, np.int64))
        for layer in range(2)
    ]
    graph = TaskGraph(1, 3, tuple(tasks))
    own = {kind: [np.zeros(0, dtype=np.int64)] * 3 for kind in Link}
    use = LinkUse(capacity, own, {0: loads, 1: loads}, streams)
    found = des.run(graph, network=use)
    assert found.step_s[0] == pytest.approx(2 * fluid(seconds, loads, capacity, streams), rel=1e-9)
    np.testing.assert_allclose(found.busy_s["dispatch"], np.full((1, 3), found.step_s[0]), rtol=1e-9)


def network_of(graph, rng, *, streams):
    """Links for a random graph: four nodes of two GPUs, some exchanges whose bytes are known, other jobs or none."""
    jobs = tuple(stream(*rng.permutation(8)[:2].tolist(), float(rng.uniform(1.0, 60.0))) for _ in range(streams))
    spec = cluster(4, 2, *jobs, rails=bool(rng.random() < 0.5), oversubscription=2.0)
    topology = build(spec)
    pairs = rng.uniform(0.0, 1e-3, (8, 8))
    exchanges = {("operation 0", -1): [topology.link_loads(pairs * (1.0 - np.eye(8)))[1]]}
    return link_use(graph, topology, exchanges, streams_of(spec, topology))


def test_over_a_network_without_contention_both_executors_agree():
    """Collectives of all ranks, one after the other on any streams: nothing meets, though links might be shared."""
    flowed = 0
    for seed in range(60):
        rng = np.random.default_rng([6, seed])
        drawn = random_graph(rng, steps=1, links=True)
        everyone = np.zeros(drawn.ranks, dtype=np.int64)
        chain = tuple(
            Task(t.name, t.operation, t.stream, t.duration_s, (i - 1,) if i else (), everyone, t.links)
            for i, t in enumerate(drawn.tasks)
        )
        graph = TaskGraph(1, drawn.ranks, chain)
        use = network_of(graph, rng, streams=0)
        assert_same(maxplus.run(graph), des.run(graph, network=use))
        alone_s = np.stack([np.broadcast_to(t.duration_s, (1, graph.ranks))[0] for t in chain])
        flowed += len(contended_flows(graph, alone_s, use))
    assert flowed > 100  # tasks that ran as flows


def test_other_jobs_never_make_anything_end_earlier():
    slower = 0
    for seed in range(60):
        rng = np.random.default_rng([7, seed])
        graph = random_graph(rng, steps=1, links=True)
        alone = maxplus.run(graph, timeline=True)
        shared = des.run(graph, network=network_of(graph, rng, streams=3), timeline=True)
        assert (shared.end_s >= alone.end_s * (1 - 1e-9)).all()
        slower += bool(shared.step_s[0] > alone.step_s[0] * (1 + 1e-6))
    assert slower > 10


def test_backgrounds_that_do_not_fit_are_refused():
    for job, said in (
        ({"kind": "stream", "gpus": [0], "bytes_per_s": 1}, "one receiver for each sender"),
        ({"kind": "stream", "gpus": [0], "to": [0], "bytes_per_s": 1}, "from one GPU to another"),
        ({"kind": "all_to_all", "gpus": [0], "bytes_per_s": 1}, "two gpus or more"),
        ({"kind": "all_to_all", "gpus": [0, 1], "to": [2], "bytes_per_s": 1}, "leave `to` out"),
        ({"kind": "stream", "gpus": [-1], "to": [1], "bytes_per_s": 1}, "count from 0"),
        ({"kind": "stream", "gpus": [0], "to": [1], "bytes_per_s": 0}, "greater than 0"),
    ):
        with pytest.raises(BadInput, match=said):
            BackgroundSpec.read(job, where="cluster.background")
    far = stream(0, 99, 1.0)
    with pytest.raises(BadInput, match="GPU 99 of a cluster of 16"):
        load_cluster(ClusterChoice(system="h200_sxm", nodes=2, background=(far,)))
