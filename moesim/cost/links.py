"""What collectives and exchanges have to move over which links, and what they reach of a datasheet's rates.

A transfer takes the time of one that carries next to nothing, the latencies of the links it passes, and the longest of
three: what a GPU moves inside its NVLink domain over a share of the link's rate, what it moves over its NIC, and, where
an exchange's kernel runs on a few multiprocessors, what each of them moves. Figures by kind: `moesim.cost.reach`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.cost.ops import Collective, MoeExchange
from moesim.cost.overlap import DEEPEP_NORMAL_MULTIPROCESSORS
from moesim.cost.reach import REL_SIGMA, LinkReach, link_reach
from moesim.spec.cluster import ClusterSpec, LinkFigure
from moesim.units import BYTES_PER_ELEMENT

# What sends from one GPU to another reach: NVLink, 370 of 450 GB/s on H100 (NVIDIA/nccl-tests issue 212).
NVLINK_FRACTION = 370.0 / 450.0
# A NIC: DeepEP's README reports 43 to 47 GB/s of the 50 GB/s of ConnectX-7 in normal mode, EP16 to EP64.
NIC_FRACTION = 0.9
# What such sends reach of a datasheet's link rates.
REACHED: dict[LinkFigure, float] = {
    "nvlink_bytes_per_s": NVLINK_FRACTION,
    "pcie_bytes_per_s": NVLINK_FRACTION,
    "nic_bytes_per_s": NIC_FRACTION,
}
# A kernel that does nothing takes this long inside a captured graph: `mem_empirical_constant_latency` in
# aiconfigurator-core 0.12.0, systems/h200_sxm.yaml (a correction by its authors, "from observations").
LAUNCH_S = 3e-6
# Latencies of a datasheet's links, beside which the time of an empty exchange was fitted: NVLink's, and a NIC's.
USUAL_S = {"near": 2e-6, "nic": 5e-6}
BETWEEN = " between domains"
"""What the kind of an exchange is called where its ranks lie in several NVLink domains."""

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Transfer:
    """What one operation moves, by the busiest rank.

    kind: as `link_reach` names it. latency_s: of the links passed. near_s: inside a domain, at the datasheet's rate or
    a measured one; far_s: over NICs, at the rate they reach; sm_bytes: that each multiprocessor of the exchange moves
    inside a domain; all three in one shape. measured: whether the domain's rate is, which then stands as it is.
    empty_s: what a transfer of nothing takes beside the latencies, None = as `link_reach` says. unlike: whether the
    figures are of transfers inside a domain, and this one is between several. always: whether a transfer of nothing
    runs.
    """

    kind: str
    latency_s: float
    near_s: Seconds
    far_s: Seconds
    sm_bytes: Seconds
    measured: bool = False
    empty_s: float | None = None
    unlike: bool = False
    always: bool = False

    @property
    def reach(self) -> LinkReach:
        """The figures of its kind."""
        return link_reach(self.kind)

    @property
    def rel_sigma(self) -> float:
        """One standard deviation of ln(true / predicted)."""
        return max(self.reach.rel_sigma, REL_SIGMA) if self.unlike else self.reach.rel_sigma

    def seconds(self) -> Seconds:
        """Seconds; 0 where nothing travels and nothing runs."""
        own = self.reach
        floor_s = own.floor_s if self.empty_s is None else self.empty_s
        busy = busy_s(self, 1.0 if self.measured else own.near, own.sm_bytes_per_s)
        return np.where((busy > 0.0) | self.always, floor_s + self.latency_s + busy, 0.0)


def busy_s(moved: Transfer, near: float, sm_bytes_per_s: float | None) -> Seconds:
    """Seconds of moving alone, at a share of the domain's rate and a rate of a multiprocessor (None: as it needs)."""
    busy = np.maximum(moved.near_s / near, moved.far_s)
    return busy if sm_bytes_per_s is None else np.maximum(busy, moved.sm_bytes / sm_bytes_per_s)


def exchange_kind(mode: str, domains: int) -> str:
    """The kind of a DeepEP exchange whose ranks lie in so many domains."""
    return f"exchange {mode}{BETWEEN if domains > 1 else ''}"


def near_name(cluster: ClusterSpec) -> LinkFigure:
    """The link figure that is the rate inside a domain."""
    return "nvlink_bytes_per_s" if cluster.nvlink_bytes_per_s else "pcie_bytes_per_s"


def nic_bytes_per_s(cluster: ClusterSpec) -> float:
    """What a GPU reaches between domains: the measured rate, or a share of the datasheet's."""
    return cluster.shared_nic_bytes_per_s * (1.0 if "nic_bytes_per_s" in cluster.measured else NIC_FRACTION)


def domains_of(cluster: ClusterSpec, op: Collective | MoeExchange) -> int:
    """NVLink domains that its ranks lie in; within one of them no byte leaves by a NIC."""
    return op.domains or cluster.domains_of(op.nodes)


def collective(cluster: ClusterSpec, op: Collective) -> Transfer:
    """Latency and bytes of ring algorithms; between domains the NIC is the bottleneck.

    Bus factors as in NVIDIA/nccl-tests doc/PERFORMANCE.md: all-reduce 2(n-1)/n, the others (n-1)/n.
    """
    size = np.asarray(op.bytes, dtype=np.float64) * (op.gpus > 1)
    steps = 2.0 if op.kind == "all_reduce" else 1.0
    domains = domains_of(cluster, op)
    latency = steps * cluster.near_latency_s * np.log2(max(op.gpus, 2))
    near = steps * (op.gpus - 1) / op.gpus * size / cluster.near_bytes_per_s
    far = np.zeros(np.shape(size))
    if domains > 1:
        latency += steps * cluster.nic_latency_s * np.log2(domains)
        # An all-to-all sends every byte for another domain over the rank's own NIC. Rings go through the domains: each
        # GPU's NIC carries its share of the domain's buffer.
        each = size if op.kind == "all_to_all" else steps * size / max(op.gpus // domains, 1)
        far = (domains - 1) / domains * each / nic_bytes_per_s(cluster)
    timed = _timed(cluster, ("nic",) if domains > 1 else ("near",))
    return Transfer(
        kind=f"collective {op.kind}",
        latency_s=float(latency),
        near_s=near,
        far_s=far,
        sm_bytes=np.zeros(np.shape(size)),
        measured=near_name(cluster) in cluster.measured,
        empty_s=LAUNCH_S if timed else None,
        unlike=domains > 1,
    )


def exchange(cluster: ClusterSpec, op: MoeExchange, multiprocessors: float = DEEPEP_NORMAL_MULTIPROCESSORS) -> Transfer:
    """DeepEP by bytes: low-latency sends a copy for each selected expert, normal one to each destination domain.

    multiprocessors: that run the normal kernel; may be an array of as many as tokens. Source: README of
    deepseek-ai/DeepEP (low-latency by expert; normal forwards from NIC to NVLink).
    """
    moved = np.asarray(op.tokens, dtype=np.float64) * op.hidden * BYTES_PER_ELEMENT[op.dtype]
    domains = domains_of(cluster, op)
    remote = (domains - 1) / domains
    if op.mode == "low_latency":
        latency = cluster.near_latency_s if domains == 1 else max(cluster.near_latency_s, cluster.nic_latency_s)
        near, far, by_kernel = op.top_k * (1.0 - remote), op.top_k * remote, 0.0
    else:
        latency = cluster.near_latency_s + (cluster.nic_latency_s if domains > 1 else 0.0)
        near = by_kernel = op.ep * (1.0 - (1.0 - 1.0 / op.ep) ** op.top_k)
        far = domains * (1.0 - (1.0 - 1.0 / domains) ** op.top_k) * remote
    kind = exchange_kind(op.mode, domains)
    return Transfer(
        kind=kind,
        latency_s=latency,
        near_s=near * moved / cluster.near_bytes_per_s,
        far_s=far * moved / nic_bytes_per_s(cluster),
        sm_bytes=by_kernel * moved / multiprocessors,
        measured=near_name(cluster) in cluster.measured,
        empty_s=empty_exchange_s(cluster, kind),
        always=op.mode == "low_latency",
    )


def empty_exchange_s(cluster: ClusterSpec, kind: str) -> float:
    """What a DeepEP exchange of nothing takes beside the latencies of its links.

    A measured latency has the sending library's own time in it, which DeepEP's kernels do not spend again: beside
    measured ones an empty exchange takes what is left of its time on links with a datasheet's.
    """
    own, levels = link_reach(kind), ("near", "nic") if kind.endswith(BETWEEN) else ("near",)
    if not _timed(cluster, levels):
        return own.floor_s
    more = {"near": cluster.near_latency_s - USUAL_S["near"], "nic": cluster.nic_latency_s - USUAL_S["nic"]}
    return max(0.0, own.floor_s - max(more[level] for level in levels))


def _timed(cluster: ClusterSpec, levels: tuple[str, ...]) -> bool:
    near = near_name(cluster).split("_")[0]
    return all(f"{near if level == 'near' else level}_latency_s" in cluster.measured for level in levels)


def at_reached_rates(cluster: ClusterSpec) -> ClusterSpec:
    """A cluster with links as fast as sends from one GPU to another find them; measured figures stand as they are."""
    return _at(cluster, REACHED)


def at_exchange_rates(cluster: ClusterSpec, kind: str) -> ClusterSpec:
    """A cluster with links as fast as a kind of transfer finds them; measured rates stand, unless a kernel is slower.

    kind: as `link_reach` names it.
    """
    own, near = link_reach(kind), near_name(cluster)
    found = _at(cluster, {near: own.near, "nic_bytes_per_s": NIC_FRACTION})
    if own.sm_bytes_per_s is None:
        return found
    most = DEEPEP_NORMAL_MULTIPROCESSORS * own.sm_bytes_per_s
    return found.model_copy(update={near: min(getattr(found, near), most)})


def _at(cluster: ClusterSpec, shares: dict[LinkFigure, float]) -> ClusterSpec:
    return cluster.model_copy(
        update={
            name: getattr(cluster, name) * (1.0 if name in cluster.measured else share)
            for name, share in shares.items()
        }
    )
