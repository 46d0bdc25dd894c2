"""The fabric of a cluster as a graph: GPUs, NVSwitches, PCIe, NICs, rails, a spine; who loads which link by how much.

A rail-optimised fabric: NIC i of every node hangs on leaf switch i ("rail"), and the leaves meet in a spine. Source:
NVIDIA DGX SuperPOD reference architecture (compute fabric, rail-optimised). Without rails a node's NICs hang on one
leaf (top of rack). A link is a directed edge between two named vertices ("gpu3", "nvswitch0", "pcie0", "socket0",
"nic3", "leaf3", "spine") with `bytes_per_s` and `latency_s`; every kind of vertex is counted over the whole cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any, Literal

import networkx as nx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import BadInput
from moesim.spec.cluster import ClusterSpec

Floats = NDArray[np.float64]
Edge = tuple[str, str]
# How traffic changes rails: over the spine, or over NVLink in the sender's domain before it leaves (NCCL's PXN, since
# version 2.12) or in the receiver's domain after it arrives (DeepEP's normal kernels).
Crossing = Literal["spine", "sender", "receiver"]
# How GPUs of one domain reach each other: over NVLink (PCIe where there is none), or over their NICs all the same, as
# DeepEP's first low-latency kernels did.
Inside = Literal["links", "network"]


@dataclass(frozen=True)
class Busiest:
    """The link that takes longest for a load, and how long."""

    link: Edge
    bytes: float
    seconds: float


@dataclass(frozen=True, eq=False)
class Topology:
    """A cluster, its graph and how traffic takes its way; `build` makes it."""

    cluster: ClusterSpec
    graph: nx.DiGraph[str]
    crossing: Crossing
    inside: Inside = "links"
    _kept: dict[str, Any] = field(default_factory=dict, repr=False)

    def path(self, source: int, destination: int) -> list[str]:
        """Vertices that traffic between two GPUs passes, both ends included; a GPU to itself: only that one.

        Raises BadInput for a GPU that the cluster does not have.
        """
        for gpu in (source, destination):
            if not 0 <= gpu < self.cluster.gpus:
                raise BadInput(f"GPU {gpu} of a cluster of {self.cluster.gpus}", mend="count GPUs from 0")
        if source == destination:
            return [f"gpu{source}"]
        if self.domain(source) == self.domain(destination) and self.inside == "links":
            return self._near(source, destination)
        rail, other = self.nic(source), self.nic(destination)
        if rail == other or self.crossing == "spine":
            up, down = self._up(source), self._up(destination)[::-1]
            return [*up, *down[1:]] if up[-1] == down[0] else [*up, *self._between(source, destination), *down]
        if self.crossing == "sender":
            relay = source - self._place(source) + self._place(destination)
            return [*self._near(source, relay)[:-1], *self.path(relay, destination)]
        relay = destination - self._place(destination) + self._place(source)
        return [*self.path(source, relay), *self._near(relay, destination)[1:]]

    def path_latency_s(self, source: int, destination: int) -> float:
        """Seconds that one message of no bytes takes between two GPUs."""
        vertices = self.path(source, destination)
        total = float(sum(self.graph.edges[edge]["latency_s"] for edge in pairwise(vertices)))
        if self.cluster.nvlink_bytes_per_s:
            return total
        gpus = [index for index, vertex in enumerate(vertices) if vertex.startswith("gpu")]
        legs = [vertices[one:other] for one, other in pairwise(gpus)]
        near = sum(not any(vertex.startswith("nic") for vertex in leg) for leg in legs)
        return total + near * self.cluster.pcie_latency_s

    def link_bytes(self, pair_bytes: ArrayLike) -> dict[Edge, float]:
        """Bytes on each link that carries any.

        pair_bytes: [gpus, gpus], from row to column; the diagonal stays on its GPU and loads nothing. Raises BadInput
        for another shape, and for a value that is negative or not finite.
        """
        load = np.array(pair_bytes, dtype=np.float64)
        gpus = self.cluster.gpus
        if load.shape != (gpus, gpus):
            raise BadInput(f"bytes of shape {load.shape} for {gpus} GPUs", mend="give [gpus, gpus]")
        if not (np.isfinite(load) & (load >= 0.0)).all():
            raise BadInput("bytes between two GPUs are negative or not finite", mend="give finite bytes of at least 0")
        np.fill_diagonal(load, 0.0)
        found: dict[Edge, float] = {}
        for source, destination in zip(*(axis.tolist() for axis in np.nonzero(load)), strict=True):
            vertices = self.path(source, destination)
            size = float(load[source, destination])
            for edge in pairwise(vertices):
                found[edge] = found.get(edge, 0.0) + size
        return found

    def busiest_s(self, pair_bytes: Floats) -> Floats:
        """Seconds of the link that takes longest at its full rate: [...] of many loads [..., gpus, gpus] at once.

        The same number as `busiest` gives for each of them. Values are taken as they are: finite, at least 0.
        """
        crossed, rates = self._incidence()
        flat = pair_bytes.reshape(-1, self.cluster.gpus**2)
        if not len(rates):
            return np.zeros(pair_bytes.shape[:-2])
        seconds = (crossed @ flat.T) / rates[:, None]
        return np.asarray(seconds.max(axis=0).reshape(pair_bytes.shape[:-2]))

    def link_loads(self, pair_bytes: Floats) -> tuple[list[Edge], Floats]:
        """All links, and the bytes on each [..., links], of many loads [..., gpus, gpus] at once; as `link_bytes`."""
        crossed, _ = self._incidence()
        flat = pair_bytes.reshape(-1, self.cluster.gpus**2)
        return list(self.graph.edges), np.asarray((crossed @ flat.T).T.reshape(*pair_bytes.shape[:-2], -1))

    def rates(self) -> Floats:
        """Bytes/s of all links, in the order of `link_loads`: [links]."""
        return np.asarray([self._rate(edge) for edge in self.graph.edges])

    def _incidence(self) -> tuple[Any, Floats]:
        """Which links each pair of GPUs crosses, sparse [links, gpus x gpus], and the links' rates; built once."""
        if "incidence" not in self._kept:
            from scipy.sparse import csr_array

            number = {edge: index for index, edge in enumerate(self.graph.edges)}
            gpus = self.cluster.gpus
            rows, columns = [], []
            for source in range(gpus):
                for destination in range(gpus):
                    for edge in pairwise(self.path(source, destination)):
                        rows.append(number[edge])
                        columns.append(source * gpus + destination)
            crossed = csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(number), gpus * gpus))
            self._kept["incidence"] = crossed, np.asarray([self._rate(edge) for edge in number])
        found: tuple[Any, Floats] = self._kept["incidence"]
        return found

    def domain(self, gpu: int) -> int:
        """The NVLink domain of a GPU (its node where there is no NVLink)."""
        return gpu // self.cluster.domain_gpus

    def nic(self, gpu: int) -> int:
        """The NIC of its node that a GPU uses."""
        return self.cluster.gpu_nic[self._place(gpu)]

    def nic_vertex(self, gpu: int) -> str:
        """The vertex of a GPU's NIC, whether the graph has a network or not."""
        return f"nic{self._node(gpu) * self.cluster.nics_per_node + self.nic(gpu)}"

    def way_to_nic(self, gpu: int) -> list[str]:
        """Vertices from a GPU to its NIC, both included."""
        return self._up(gpu)

    def relay(self, gpu: int, nic: int) -> int:
        """The first GPU of `gpu`'s node that uses NIC `nic`."""
        return self._node(gpu) * self.cluster.gpus_per_node + self.cluster.gpu_nic.index(nic)

    def _near(self, source: int, destination: int) -> list[str]:
        """The way inside a domain: over the NVSwitch, or up and down the PCIe tree."""
        ends = f"gpu{source}", f"gpu{destination}"
        if source == destination:
            return [ends[0]]
        if self.cluster.nvlink_bytes_per_s:
            return [ends[0], f"nvswitch{self.domain(source)}", ends[1]]
        return [ends[0], *_over_pcie(self._tree(source), self._tree(destination)), ends[1]]

    def _up(self, gpu: int) -> list[str]:
        """From a GPU to its NIC, both included."""
        ends = f"gpu{gpu}", self.nic_vertex(gpu)
        if not self.cluster.node.gpu_switch:
            return list(ends)
        switch = self.cluster.node.nic_switch[self.nic(gpu)]
        return [ends[0], *_over_pcie(self._tree(gpu), _tree(self.cluster, self._node(gpu), switch)), ends[1]]

    def _between(self, source: int, destination: int) -> list[str]:
        """Switches between two NICs."""
        one, other = (_leaf(self.cluster, self._node(gpu), self.nic(gpu)) for gpu in (source, destination))
        return [one] if one == other else [one, "spine", other]

    def _tree(self, gpu: int) -> tuple[str, str]:
        switches = self.cluster.node.gpu_switch
        return _tree(self.cluster, self._node(gpu), switches[self._place(gpu)] if switches else 0)

    def _node(self, gpu: int) -> int:
        return gpu // self.cluster.gpus_per_node

    def _place(self, gpu: int) -> int:
        return gpu % self.cluster.gpus_per_node

    def busiest(self, pair_bytes: ArrayLike) -> Busiest | None:
        """The link that takes longest at its full rate; None when nothing travels. Ties: the first in the graph.

        The time is a lower bound of any exchange of these bytes over these paths. Raises as `link_bytes`.
        """
        load = self.link_bytes(pair_bytes)
        if not load:
            return None
        edge = max((edge for edge in self.graph.edges if edge in load), key=lambda edge: load[edge] / self._rate(edge))
        return Busiest(link=edge, bytes=load[edge], seconds=load[edge] / self._rate(edge))

    def endpoint_s(self, pair_bytes: ArrayLike) -> Floats:
        """Seconds that the busiest own link of each GPU takes (NVLink, PCIe or NIC, in or out): [gpus]."""
        load = self.link_bytes(pair_bytes)
        longest = np.zeros(self.cluster.gpus)
        for gpu in range(self.cluster.gpus):
            own = {f"gpu{gpu}", self.nic_vertex(gpu)}
            for vertex in own & set(self.graph):
                for edge in (*self.graph.in_edges(vertex), *self.graph.out_edges(vertex)):
                    longest[gpu] = max(longest[gpu], load.get(edge, 0.0) / self._rate(edge))
        return longest

    def _rate(self, edge: Edge) -> float:
        return float(self.graph.edges[edge]["bytes_per_s"])


def build(
    cluster: ClusterSpec,
    *,
    oversubscription: float | None = None,
    crossing: Crossing = "spine",
    inside: Inside = "links",
) -> Topology:
    """The topology of a cluster: its domains, the NICs that its GPUs use, leaves and one spine.

    oversubscription: bytes/s that a leaf's NICs can send over bytes/s of its uplink to the spine (1 = non-blocking);
    the cluster's own unless given. Latencies are assumed to split evenly: half of `nvlink_latency_s` on each side of an
    NVSwitch, half of `nic_latency_s` on each NIC's cable, none elsewhere; a way over PCIe between two GPUs takes
    `pcie_latency_s` as a whole. Without a second domain there is no network, unless `inside` asks for it.
    Raises BadInput for an oversubscription below 1, and where domains split nodes or relaying needs whole nodes in a
    domain.
    """
    over = cluster.oversubscription if oversubscription is None else oversubscription
    if not over >= 1.0:
        raise BadInput(f"an oversubscription of {over}", mend="give 1 or more")
    if inside == "network" and crossing != "spine":
        raise BadInput("rails are crossed over NVLink, which is left unused", mend='use crossing="spine"')
    if cluster.domain_gpus < cluster.gpus and cluster.domain_gpus % cluster.gpus_per_node:
        raise BadInput(
            f"NVLink domains of {cluster.domain_gpus} GPUs split nodes of {cluster.gpus_per_node}",
            where=cluster.name,
            mend="give a multiple of gpus_per_node",
        )
    graph: nx.DiGraph[str] = nx.DiGraph()
    network = cluster.domain_gpus < cluster.gpus or inside == "network"
    if cluster.nvlink_bytes_per_s and inside == "links":
        for gpu in range(cluster.gpus):
            switch = f"nvswitch{gpu // cluster.domain_gpus}"
            _join(graph, f"gpu{gpu}", switch, cluster.nvlink_bytes_per_s, cluster.nvlink_latency_s / 2)
    _add_pcie(graph, cluster, network)
    if network:
        _add_network(graph, cluster, over)
    return Topology(cluster=cluster, graph=graph, crossing=crossing, inside=inside)


def with_slow_nics(topology: Topology, shares: Mapping[str, float]) -> Topology:
    """The same fabric with some NICs slower: their cables carry a share of the rate that the cluster gives them.

    shares: NIC vertex ("nic3", counted over the cluster) -> above 0 and at most 1, of both directions. Raises BadInput
    for a NIC that the graph does not have, or another share.
    """
    graph = topology.graph.copy()
    for vertex, share in shares.items():
        if not vertex.startswith("nic") or vertex not in graph:
            raise BadInput(f"there is no NIC {vertex!r}", where=topology.cluster.name, mend="count NICs from nic0")
        if not 0.0 < share <= 1.0:
            raise BadInput(
                f"a share of {share} of a NIC's rate", where=topology.cluster.name, mend="above 0 and up to 1"
            )
        for edge in (*graph.in_edges(vertex), *graph.out_edges(vertex)):
            if any(end.startswith("leaf") for end in edge):
                graph.edges[edge]["bytes_per_s"] *= share
    return Topology(topology.cluster, graph, topology.crossing, topology.inside)


def _add_pcie(graph: nx.DiGraph[str], cluster: ClusterSpec, network: bool) -> None:
    """PCIe: GPUs to their NICs, directly or over switches and sockets; and GPUs to each other without NVLink."""
    node, rate = cluster.node, cluster.pcie_bytes_per_s
    alone = not cluster.nvlink_bytes_per_s
    for number in range(cluster.nodes):
        first = number * cluster.gpus_per_node
        switches = node.gpu_switch or (0,) * cluster.gpus_per_node
        if alone or (network and node.gpu_switch):
            for place in range(cluster.gpus_per_node):
                _join(graph, f"gpu{first + place}", _tree(cluster, number, switches[place])[0], rate, 0.0)
            used = {*switches, *(node.nic_switch if network else ())}
            for switch in sorted(used) if node.gpu_switch else ():
                _join(graph, *_tree(cluster, number, switch), rate, 0.0)
            sockets = sorted({_tree(cluster, number, switch)[1] for switch in used})
            for one, other in combinations(sockets, 2):
                _join(graph, one, other, cluster.socket_bytes_per_s or rate, 0.0)
        for nic in range(cluster.nics_per_node if network else 0):
            vertex = f"nic{number * cluster.nics_per_node + nic}"
            if node.gpu_switch:
                _join(graph, _tree(cluster, number, node.nic_switch[nic])[0], vertex, rate, 0.0)
                continue
            for place, used_nic in enumerate(cluster.gpu_nic):
                if used_nic == nic:
                    _join(graph, f"gpu{first + place}", vertex, rate, 0.0)


def _add_network(graph: nx.DiGraph[str], cluster: ClusterSpec, over: float) -> None:
    """NICs to leaves, leaves to the spine."""
    nics: dict[str, int] = {}
    for number in range(cluster.nodes):
        for nic in range(cluster.nics_per_node):
            leaf = _leaf(cluster, number, nic)
            nics[leaf] = nics.get(leaf, 0) + 1
            vertex = f"nic{number * cluster.nics_per_node + nic}"
            _join(graph, vertex, leaf, cluster.nic_bytes_per_s, cluster.nic_latency_s / 2)
    for leaf, below in nics.items():
        _join(graph, leaf, "spine", below * cluster.nic_bytes_per_s / over, 0.0)


def _join(graph: nx.DiGraph[str], one: str, other: str, bytes_per_s: float, latency_s: float) -> None:
    graph.add_edge(one, other, bytes_per_s=bytes_per_s, latency_s=latency_s)
    graph.add_edge(other, one, bytes_per_s=bytes_per_s, latency_s=latency_s)


def _leaf(cluster: ClusterSpec, node: int, nic: int) -> str:
    """The leaf switch of a NIC."""
    per_leaf = cluster.nodes_per_leaf or (cluster.nodes if cluster.rails else 1)
    width = cluster.nics_per_node if cluster.rails else 1
    return f"leaf{node // per_leaf * width + (nic if cluster.rails else 0)}"


def _tree(cluster: ClusterSpec, node: int, switch: int) -> tuple[str, str]:
    """The vertices of a node's PCIe switch and of its socket."""
    layout = cluster.node
    width = max((*layout.gpu_switch, *layout.nic_switch), default=0) + 1
    sockets = layout.switch_socket or (0,)
    socket = layout.switch_socket[switch] if layout.switch_socket else 0
    return f"pcie{node * width + switch}", f"socket{node * (max(sockets) + 1) + socket}"


def _over_pcie(one: tuple[str, str], other: tuple[str, str]) -> list[str]:
    """Switches and sockets between two PCIe switches, those two included: up only as far as is needed."""
    if one[0] == other[0]:
        return [one[0]]
    return [one[0], one[1], other[0]] if one[1] == other[1] else [one[0], one[1], other[1], other[0]]
