"""Which links of the cluster the tasks of a step use: what `des` needs to let them, and other jobs, share links.

Dispatches and combines put the bytes of their backend's rule on the paths that the topology gives them. Other tasks use
the links of their ranks as `Task.links` says: NVLink to and from a GPU's switch, the way to and from its NIC. A task on
the host's PCIe meets only its like.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from moesim.engine.links import NO_STREAMS, Finish, Flows, Operation, Streams
from moesim.graph.batch import StepBatch
from moesim.graph.flows import phase_bytes
from moesim.graph.pricing import Pricer
from moesim.graph.task import Link, Stream, TaskGraph
from moesim.network.topology import Edge, Topology, build
from moesim.spec.cluster import BackgroundSpec, ClusterSpec

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# The rank of flows that belong to all ranks of a collective.
EVERYONE = -1
# Asked above a link's rate by this part is rounding.
ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class LinkUse:
    """Links of a cluster and who uses them.

    capacity: [links] bytes/s. own: by kind of link, the links of each rank, in and out; of PCIE one to the host.
    exchanged: task -> bytes on each link [links], of exchanges whose bytes are known. streams: other jobs.
    """

    capacity: Floats
    own: dict[Link, list[Ints]]
    exchanged: dict[int, Floats]
    streams: Streams


def link_use(
    graph: TaskGraph, topology: Topology, exchanges: dict[tuple[str, int], list[Floats]], streams: Streams = NO_STREAMS
) -> LinkUse:
    """The links that a graph's tasks use.

    topology: of the cluster; rank r of the graph is GPU r. exchanges: (operation, layer) -> for each micro-batch, bytes
    on each link [links of the topology]. Where a schedule has another number of such tasks than micro-batches, each
    gets an even part of all.
    """
    number = {edge: index for index, edge in enumerate(topology.graph.edges)}
    host = topology.cluster.pcie_bytes_per_s
    capacity = np.concatenate([topology.rates(), np.full(graph.ranks, host)])
    own = {
        Link.NVLINK: [_near(topology, rank, number) for rank in range(graph.ranks)],
        Link.NIC: [_to_network(topology, rank, number) for rank in range(graph.ranks)],
        Link.PCIE: [np.asarray([len(number) + rank], dtype=np.int64) for rank in range(graph.ranks)],
    }
    places: dict[tuple[str, int], list[int]] = {}
    for index, task in enumerate(graph.tasks):
        if (task.operation, task.layer) in exchanges:
            places.setdefault((task.operation, task.layer), []).append(index)
    exchanged: dict[int, Floats] = {}
    for key, tasks in places.items():
        parts = exchanges[key]
        if len(parts) != len(tasks):
            parts = [np.sum(parts, axis=0) / len(tasks)] * len(tasks)
        for index, part in zip(tasks, parts, strict=True):
            exchanged[index] = np.concatenate([part, np.zeros(graph.ranks)])
    return LinkUse(capacity, own, exchanged, streams)


def streams_of(cluster: ClusterSpec, topology: Topology) -> Streams:
    """The background of a cluster as flows: a stream for each pair; of an all-to-all one on each link that it loads."""
    number = {edge: index for index, edge in enumerate(topology.graph.edges)}
    asked: list[float] = []
    crossed: list[list[int]] = []
    for job in cluster.background:
        if job.kind == "stream":
            for sender, receiver in zip(job.gpus, job.to, strict=True):
                asked.append(job.bytes_per_s)
                crossed.append([number[edge] for edge in pairwise(topology.path(sender, receiver))])
        else:
            for edge, load in topology.link_bytes(_job_pairs(job, cluster.gpus)).items():
                asked.append(load)
                crossed.append([number[edge]])
    start = np.concatenate([[0], np.cumsum([len(links) for links in crossed])]).astype(np.int64)
    return Streams(
        np.asarray(asked, dtype=np.float64), start, np.asarray(list(chain.from_iterable(crossed)), dtype=np.int64)
    )


def exchange_links(
    pricer: Pricer, micro: Sequence[tuple[StepBatch, Floats]], mode: str, cluster: ClusterSpec
) -> tuple[Topology, dict[tuple[str, int], list[Floats]]]:
    """The cluster's topology, and what `link_use` asks of exchanges, for one step in micro-batches (batch, counts).

    The instance is the first on the cluster: its ranks are GPUs 0 and up.
    """
    found: dict[tuple[str, int], list[Floats]] = {}
    gpus, layers = pricer.setup.parallel.gpus, pricer.setup.model.moe.layer_ids
    topology: Topology | None = None
    for batch, counts in micro:
        whole: dict[str, Floats] = {}
        for phase in phase_bytes(pricer, batch, counts, mode):
            of = phase.exchange.topology
            topology = topology or build(cluster, crossing=of.crossing, inside=of.inside)
            pairs = np.zeros((len(layers), cluster.gpus, cluster.gpus))
            pairs[:, :gpus, :gpus] = phase.pairs[0]
            whole[phase.step] = whole.get(phase.step, 0.0) + topology.link_loads(pairs)[1]
        for step, loads in whole.items():
            for layer, load in zip(layers, loads, strict=True):
                found.setdefault((step, layer), []).append(load)
    return topology or build(cluster), found


def _job_pairs(job: BackgroundSpec, gpus: int) -> Floats:
    """Bytes/s of a background all-to-all: [gpus, gpus]."""
    pairs = np.zeros((gpus, gpus))
    pairs[np.ix_(job.gpus, job.gpus)] = job.bytes_per_s / (len(job.gpus) - 1)
    np.fill_diagonal(pairs, 0.0)
    return pairs


def _near(topology: Topology, rank: int, number: dict[Edge, int]) -> Ints:
    """Links of a GPU inside its domain, out and in."""
    fast = bool(topology.cluster.nvlink_bytes_per_s)
    others = [
        vertex
        for vertex in topology.graph.successors(f"gpu{rank}")
        if (vertex.startswith("nvswitch") if fast else not vertex.startswith("nic"))
    ]
    return _both_ways([(f"gpu{rank}", other) for other in others], number)


def _to_network(topology: Topology, rank: int, number: dict[Edge, int]) -> Ints:
    """The way from a GPU over its NIC to the leaf, and back; none without a network."""
    nic = topology.nic_vertex(rank)
    if nic not in topology.graph:
        return np.zeros(0, dtype=np.int64)
    leaves = [(nic, vertex) for vertex in topology.graph.successors(nic) if vertex.startswith("leaf")]
    return _both_ways([*pairwise(topology.way_to_nic(rank)), *leaves], number)


def _both_ways(edges: list[Edge], number: dict[Edge, int]) -> Ints:
    return np.asarray([number[way] for one, other in edges for way in ((one, other), (other, one))], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class RankFlows:
    """Flows of a task that belong to one rank, or to EVERYONE: the link of each, and bytes/s asked when alone."""

    rank: int
    link: Ints
    asked: Floats


def contended_flows(graph: TaskGraph, alone_s: Floats, network: LinkUse) -> dict[int, list[RankFlows]]:
    """Flows of every task, on links of which more than their rate can be asked; alone_s: [tasks, ranks].

    A stream of a rank runs one task at a time, so a link can be asked for its background and, for each rank and stream,
    the most that one task asks for.
    """
    capacity, streams = network.capacity, network.streams
    found = {index: _asked(graph, index, alone_s[index], network) for index in range(len(graph.tasks))}
    most: dict[tuple[Stream, int], Floats] = defaultdict(lambda: np.zeros(len(capacity)))
    for index, flows in found.items():
        for one in flows:
            np.maximum.at(most[graph.tasks[index].stream, one.rank], one.link, one.asked)
    together = np.sum([np.zeros(len(capacity)), *most.values()], axis=0)
    np.add.at(together, streams.link, np.repeat(streams.asked, np.diff(streams.start)))
    contended = together > capacity * (1.0 + ROUNDING)
    kept = {
        index: [
            RankFlows(one.rank, one.link[contended[one.link]], one.asked[contended[one.link]])
            for one in flows
            if contended[one.link].any()
        ]
        for index, flows in found.items()
    }
    return {index: flows for index, flows in kept.items() if flows}


def _asked(graph: TaskGraph, index: int, alone_s: Floats, network: LinkUse) -> list[RankFlows]:
    """What one task asks of each link when alone: bytes over its time, never above the link's rate."""
    task, capacity = graph.tasks[index], network.capacity
    whole = task.groups is not None and bool((task.groups == task.groups[0]).all())
    if index in network.exchanged and whole and alone_s[0] > 0 and (alone_s == alone_s[0]).all():
        loads = network.exchanged[index]
        link = np.flatnonzero(loads)
        return [RankFlows(EVERYONE, link, np.minimum(loads[link] / alone_s[0], capacity[link]))]
    found = []
    for kind, share in task.links:
        for rank in np.flatnonzero(alone_s > 0).tolist() if share > 0 else ():
            link = network.own[kind][rank]
            found.append(RankFlows(rank, link, share * capacity[link]))
    return found


def operation(flows: Sequence[RankFlows], alone_s: Mapping[int, float], finish: Finish) -> Operation:
    """A task that starts on some ranks: parts by the time that they take alone, one flow on each link.

    A link that several of its ranks use (a shared NIC) carries the most that one of them asks for: the task's own time
    alone holds what its ranks do to each other.
    """
    leaving: dict[float, list[int]] = defaultdict(list)
    for rank, seconds in alone_s.items():
        leaving[seconds].append(rank)
    times = sorted(leaving)
    part_of = {rank: times.index(seconds) for rank, seconds in alone_s.items()} | {EVERYONE: len(times) - 1}
    asked: dict[int, float] = {}
    part: dict[int, int] = {}
    for one in flows:
        if one.rank in part_of:
            for link, rate in zip(one.link.tolist(), one.asked.tolist(), strict=True):
                asked[link] = max(asked.get(link, 0.0), rate)
                part[link] = max(part.get(link, 0), part_of[one.rank])
    return Operation(
        times,
        [leaving[seconds] for seconds in times],
        Flows(
            np.asarray(list(asked), dtype=np.int64),
            np.asarray(list(asked.values()), dtype=np.float64),
            np.asarray(list(part.values()), dtype=np.int64),
        ),
        finish,
    )
