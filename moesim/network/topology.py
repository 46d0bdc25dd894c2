"""The fabric of a cluster as a graph: GPUs, NVSwitches, NICs, rails and a spine; who loads which link by how much.

A rail-optimised fabric: NIC i of every node hangs on leaf switch i ("rail"), and the leaves meet in a spine. Source:
NVIDIA DGX SuperPOD reference architecture (compute fabric, rail-optimised). A link is a directed edge between two named
vertices ("gpu3", "nvswitch0", "nic3", "leaf3", "spine") with `bytes_per_s`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

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


@dataclass(frozen=True)
class Busiest:
    """The link that takes longest for a load, and how long."""

    link: Edge
    bytes: float
    seconds: float


@dataclass(frozen=True, eq=False)
class Topology:
    """A cluster, its graph and how rails are crossed; `build` makes it."""

    cluster: ClusterSpec
    graph: nx.DiGraph[str]
    crossing: Crossing

    def path(self, source: int, destination: int) -> list[str]:
        """Vertices that traffic between two GPUs passes, both ends included; a GPU to itself: only that one.

        Raises BadInput for a GPU that the cluster does not have.
        """
        for gpu in (source, destination):
            if not 0 <= gpu < self.cluster.gpus:
                raise BadInput(f"GPU {gpu} of a cluster of {self.cluster.gpus}", mend="count GPUs from 0")
        if source == destination:
            return [f"gpu{source}"]
        if self._domain(source) == self._domain(destination):
            return [f"gpu{source}", f"nvswitch{self._domain(source)}", f"gpu{destination}"]
        rail, other = self._rail(source), self._rail(destination)
        if rail == other:
            return [f"gpu{source}", f"nic{source}", f"leaf{rail}", f"nic{destination}", f"gpu{destination}"]
        if self.crossing == "spine":
            legs = [f"gpu{source}", f"nic{source}", f"leaf{rail}", "spine", f"leaf{other}", f"nic{destination}"]
            return [*legs, f"gpu{destination}"]
        if self.crossing == "sender":
            relay = source - rail + other
            return [f"gpu{source}", f"nvswitch{self._domain(source)}", *self.path(relay, destination)]
        relay = destination - other + rail
        return [*self.path(source, relay), f"nvswitch{self._domain(destination)}", f"gpu{destination}"]

    def path_latency_s(self, source: int, destination: int) -> float:
        """Seconds that one message of no bytes takes between two GPUs."""
        vertices = self.path(source, destination)
        edges = pairwise(vertices)
        return float(sum(self.graph.edges[edge]["latency_s"] for edge in edges))

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
            own = {f"gpu{gpu}", f"nic{gpu}"}
            for vertex in own & set(self.graph):
                for edge in (*self.graph.in_edges(vertex), *self.graph.out_edges(vertex)):
                    longest[gpu] = max(longest[gpu], load.get(edge, 0.0) / self._rate(edge))
        return longest

    def _rate(self, edge: Edge) -> float:
        return float(self.graph.edges[edge]["bytes_per_s"])

    def _domain(self, gpu: int) -> int:
        return gpu // self.cluster.domain_gpus

    def _rail(self, gpu: int) -> int:
        return gpu % self.cluster.gpus_per_node


def build(cluster: ClusterSpec, *, oversubscription: float = 1.0, crossing: Crossing = "spine") -> Topology:
    """The topology of a cluster: one NIC for each GPU, one leaf for each place in a node, one spine.

    oversubscription: bytes/s that a leaf's NICs can send over bytes/s of its uplink to the spine (1 = non-blocking).
    Latencies are assumed to split evenly: half of `nvlink_latency_s` on each side of an NVSwitch, half of
    `nic_latency_s` on each NIC's cable, none elsewhere. Without a second NVLink domain there is no network. Raises
    BadInput for an oversubscription below 1, and where domains split nodes or relaying needs whole nodes in a domain.
    """
    if not oversubscription >= 1.0:
        raise BadInput(f"an oversubscription of {oversubscription}", mend="give 1 or more")
    if cluster.domain_gpus < cluster.gpus and cluster.domain_gpus % cluster.gpus_per_node:
        raise BadInput(
            f"NVLink domains of {cluster.domain_gpus} GPUs split nodes of {cluster.gpus_per_node}",
            where=cluster.name,
            mend="give a multiple of gpus_per_node",
        )
    graph: nx.DiGraph[str] = nx.DiGraph()

    def join(one: str, other: str, bytes_per_s: float, latency_s: float) -> None:
        graph.add_edge(one, other, bytes_per_s=bytes_per_s, latency_s=latency_s)
        graph.add_edge(other, one, bytes_per_s=bytes_per_s, latency_s=latency_s)

    for gpu in range(cluster.gpus):
        switch = f"nvswitch{gpu // cluster.domain_gpus}"
        join(f"gpu{gpu}", switch, cluster.nvlink_bytes_per_s, cluster.nvlink_latency_s / 2)
    if cluster.domain_gpus < cluster.gpus:
        for gpu in range(cluster.gpus):
            join(f"gpu{gpu}", f"nic{gpu}", cluster.pcie_bytes_per_s, 0.0)
            leaf = f"leaf{gpu % cluster.gpus_per_node}"
            join(f"nic{gpu}", leaf, cluster.nic_bytes_per_s, cluster.nic_latency_s / 2)
        uplink = cluster.nodes * cluster.nic_bytes_per_s / oversubscription
        for rail in range(cluster.gpus_per_node):
            join(f"leaf{rail}", "spine", uplink, 0.0)
    return Topology(cluster=cluster, graph=graph, crossing=crossing)
