"""What moesim says of a lab: its cluster as moesim describes one, and the time of every exchange on it.

Nothing here knows how long an exchange takes: who forwards what comes from `moesim.network.exchange`, which link is the
busiest from `moesim.network.topology`, two exchanges at once from `moesim.network.fluid` and, on record beside it, from
the `des` executor.

What is given to them: the lab's own rates, times the part of a packet that is payload (a formula), its delay, and two
measured figures (`validate.fabric.calibrate`). All ranks of a lab share the processors of one machine, which no cluster
does: so the copying rate is the machine's, split evenly over the ranks, and every message of a stage adds the processor
time that it costs, whosever it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moesim.engine import des
from moesim.engine.linkuse import link_use
from moesim.graph.task import Stream, Task, TaskGraph
from moesim.network.exchange import Exchange, prepare
from moesim.network.fluid import finish_s
from moesim.network.topology import Topology, build, with_slow_nics
from moesim.spec.cluster import ClusterSpec, GpuSpec, NodeLayout
from validate.fabric.calibrate import Figures
from validate.fabric.plan import Tokens, tokens_of
from validate.fabric.rank import Case
from validate.fabric.spec import LabSpec

Floats = NDArray[np.float64]
# Of a packet: Ethernet (IEEE 802.3, without preamble and checksum, which tbf does not count), IPv4 (RFC 791), TCP
# (RFC 9293) and its timestamps (RFC 7323), padded to 12 bytes.
ETHERNET_BYTES, IP_BYTES, TCP_BYTES, TIMESTAMP_BYTES = 14, 20, 20, 12
# A rank has no PCIe: what it sends is at its NIC at once.
NO_LIMIT = 1e15
STREAMS = (Stream.COMMUNICATION, Stream.COPY)


def payload(bits_per_s: float, mtu_bytes: int) -> float:
    """Bytes/s of data through a rate that counts whole packets."""
    data = mtu_bytes - IP_BYTES - TCP_BYTES - TIMESTAMP_BYTES
    return bits_per_s / 8.0 * data / (mtu_bytes + ETHERNET_BYTES)


def cluster_of(lab: LabSpec, figures: Figures) -> ClusterSpec:
    """The lab as a cluster: ranks are GPUs, loopback is NVLink."""
    nic = payload(lab.nic_bits_per_s, lab.mtu_bytes)
    return ClusterSpec(
        name=lab.name,
        gpu=GpuSpec(name="a process", hbm_bytes=1.0, hbm_bytes_per_s=1.0, flops_per_s={"bf16": 1.0}, multiprocessors=1),
        nodes=lab.nodes,
        gpus_per_node=lab.ranks_per_node,
        nvlink_bytes_per_s=figures.copy_bytes_per_s / lab.ranks,
        nvlink_latency_s=0.0,
        nic_bytes_per_s=nic,
        nic_latency_s=lab.delay_s,
        pcie_bytes_per_s=NO_LIMIT,
        node=NodeLayout(gpu_nic=tuple(lab.nic(rank) for rank in range(lab.ranks_per_node))),
        rails=lab.rails,
        nodes_per_leaf=lab.nodes_per_leaf or lab.nodes,
        oversubscription=lab.nics_per_leaf * lab.nic_bits_per_s / lab.uplink_bits_per_s,
    )


def topology_of(lab: LabSpec, figures: Figures) -> Topology:
    """The lab's links, slow NICs included."""
    shares = {
        f"nic{slow.node * lab.nics_per_node + slow.nic}": slow.bits_per_s / lab.nic_bits_per_s for slow in lab.slow_nics
    }
    return with_slow_nics(build(cluster_of(lab, figures)), shares)


def straight(topology: Topology) -> Exchange:
    """One all-to-all as the ranks run it: every message straight to its rank, all of them posted at once."""
    return Exchange("deepep_low_latency", topology)


def stage_bytes(lab: LabSpec, tokens: Tokens, scheme: str, topology: Topology) -> list[tuple[str, Floats]]:
    """Name and bytes [ranks, ranks] of each all-to-all of an exchange, one after the other."""
    if scheme == "flat":
        return [("flat", _bytes(tokens.flat(), lab))]
    normal = prepare(topology.cluster, "deepep_normal")
    to_nodes = _bytes(tokens.node_copies(lab.nodes), lab)
    loads = normal.loads(_bytes(tokens.rank_copies(), lab), to_nodes)
    return [(name, load) for name, _, load in loads]


def _bytes(rows: NDArray[np.int64], lab: LabSpec) -> Floats:
    return np.asarray(rows * float(lab.row_bytes), dtype=np.float64)


def seconds_of(lab: LabSpec, case: Case, figures: Figures) -> list[float]:
    """Seconds until each exchange of a case is over. Raises BadInput, Infeasible."""
    topology = topology_of(lab, figures)
    sized = lab.model_copy(update={"bytes_per_rank": case.bytes_per_rank})
    stages = [stage_bytes(lab, tokens_of(sized, name), case.scheme, topology) for name in case.patterns]
    exchange = straight(topology)
    posting = [sum(figures.message_s * messages(load) for _, load in parts) for parts in stages]
    if len(stages) > 1:
        loads = [parts[0][1] for parts in stages]
        return [float(end) + lab.delay_s + sum(posting) for end in finish_s(topology, loads)]
    return [sum(float(exchange.time(load).seconds) for _, load in stages[0]) + posting[0]]


def by_executor(lab: LabSpec, case: Case, figures: Figures) -> list[float]:
    """What the `des` executor says of two exchanges at once, for the record; empty of one alone."""
    if len(case.patterns) == 1:
        return []
    topology = topology_of(lab, figures)
    sized = lab.model_copy(update={"bytes_per_rank": case.bytes_per_rank})
    loads = [stage_bytes(lab, tokens_of(sized, name), case.scheme, topology)[0][1] for name in case.patterns]
    exchange = straight(topology)
    return together(topology, loads, [float(exchange.time(load).seconds) for load in loads])


def messages(load: Floats) -> int:
    """Messages of an all-to-all of these bytes [ranks, ranks]."""
    return int(np.count_nonzero(load * (1.0 - np.eye(len(load)))))


def together(topology: Topology, loads: Sequence[Floats], alone_s: Sequence[float]) -> list[float]:
    """Seconds until each of two exchanges that start at once is over: their flows share links max-min fair."""
    ranks = topology.cluster.gpus
    everyone = np.zeros(ranks, dtype=np.int64)
    names = [f"exchange {number}" for number in range(len(loads))]
    graph = TaskGraph(
        1,
        ranks,
        tuple(
            Task(name, name, stream, np.asarray(seconds), groups=everyone)
            for name, stream, seconds in zip(names, STREAMS, alone_s, strict=True)
        ),
    )
    moved = {(name, -1): [topology.link_loads(load)[1]] for name, load in zip(names, loads, strict=True)}
    found = des.run(graph, timeline=True, network=link_use(graph, topology, moved))
    assert found.end_s is not None
    return [float(end.max()) for end in found.end_s]


def busiest_link(lab: LabSpec, case: Case, figures: Figures) -> str:
    """The link that bounds the longest stage of a case's first exchange, in words."""
    topology = topology_of(lab, figures)
    sized = lab.model_copy(update={"bytes_per_rank": case.bytes_per_rank})
    stages = stage_bytes(lab, tokens_of(sized, case.patterns[0]), case.scheme, topology)
    found = [one for one in (topology.busiest(load) for _, load in stages) if one is not None]
    return " to ".join(max(found, key=lambda one: one.seconds).link) if found else ""
