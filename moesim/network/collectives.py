"""What collectives cost by formula: alpha (seconds a message) plus bytes over a link's rate.

Sources: R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of Collective Communication Operations in MPICH",
International Journal of High Performance Computing Applications 19(1), 2005 (ring, pairwise exchange; reduction's own
arithmetic is left out); P. Sanders, J. Speck, J. L. Träff, "Two-tree algorithms for full bandwidth broadcast, reduction
and scan", Parallel Computing 35(12), 2009 (double trees, as NCCL uses them between nodes); bus bandwidth factors from
NVIDIA nccl-tests, doc/PERFORMANCE.md; hierarchical all-to-all as in Tutel (arXiv:2206.03382) and DeepSpeed-MoE
(arXiv:2201.05596).

Sizes are counted as nccl-tests does: all_reduce the reduced buffer, all_gather and reduce_scatter the whole (gathered)
buffer, all_to_all the whole send buffer of one rank with its own part. Sizes may be arrays of any shape; one rank
costs 0.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.cost.ops import Collective
from moesim.errors import BadInput
from moesim.spec.cluster import ClusterSpec

Floats = NDArray[np.float64]
Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


def bus_factor(kind: Kind, ranks: int) -> float:
    """Bus bandwidth over algorithm bandwidth: bytes that a rank's link carries for each byte of size (nccl-tests)."""
    part = (_checked(ranks) - 1) / ranks
    return 2.0 * part if kind == "all_reduce" else part


def bus_bandwidth(kind: Kind, size_bytes: ArrayLike, seconds: ArrayLike, ranks: int) -> Floats:
    """Bytes/s that nccl-tests prints as busbw for a size and its time."""
    size = np.asarray(size_bytes, dtype=np.float64)
    return np.asarray(size / np.asarray(seconds, dtype=np.float64) * bus_factor(kind, ranks))


def all_reduce_ring(size_bytes: ArrayLike, ranks: int, latency_s: float, link_bytes_per_s: float) -> Floats:
    """Ring: reduce-scatter, then all-gather: 2 (p - 1) alpha + 2 (p - 1) / p n / B (Thakur et al.)."""
    return 2.0 * all_gather_ring(size_bytes, ranks, latency_s, link_bytes_per_s)


def all_reduce_tree(size_bytes: ArrayLike, ranks: int, latency_s: float, link_bytes_per_s: float) -> Floats:
    """Double binary tree, up and down: 2 ceil(log2 p) alpha + 2 n / B.

    Sanders et al.; their term for filling the pipeline, of order sqrt(n alpha log p / B), is left out: a lower bound.
    """
    if _checked(ranks) == 1:
        return np.zeros(np.shape(size_bytes))
    levels = (ranks - 1).bit_length()  # ceil(log2 p), in integers
    return np.asarray(2.0 * levels * latency_s + 2.0 * _sizes(size_bytes) / link_bytes_per_s)


def all_gather_ring(size_bytes: ArrayLike, ranks: int, latency_s: float, link_bytes_per_s: float) -> Floats:
    """Ring: (p - 1) alpha + (p - 1) / p n / B (Thakur et al.)."""
    others = _checked(ranks) - 1
    return np.asarray(others * latency_s + others / ranks * _sizes(size_bytes) / link_bytes_per_s)


def reduce_scatter_ring(size_bytes: ArrayLike, ranks: int, latency_s: float, link_bytes_per_s: float) -> Floats:
    """Ring or pairwise exchange: (p - 1) alpha + (p - 1) / p n / B (Thakur et al.)."""
    return all_gather_ring(size_bytes, ranks, latency_s, link_bytes_per_s)


def all_to_all_pairwise(size_bytes: ArrayLike, ranks: int, latency_s: float, link_bytes_per_s: float) -> Floats:
    """Pairwise exchange over one kind of link: (p - 1) alpha + (p - 1) / p n / B (Thakur et al.)."""
    return all_gather_ring(size_bytes, ranks, latency_s, link_bytes_per_s)


def all_to_all_flat(size_bytes: ArrayLike, cluster: ClusterSpec, gpus: int) -> Floats:
    """Every rank sends to every other: over NVLink within its domain, over its NIC to the rest, both at once.

    With m = n / p: max of (d - 1) (alpha + m / B) over NVLink and (p - d) (alpha + m / B) over the NIC, d ranks to a
    domain (pairwise exchange on each).
    """
    domain, domains = _domains(cluster, gpus)
    message = _sizes(size_bytes) / gpus
    near = (domain - 1) * (cluster.near_latency_s + message / cluster.near_bytes_per_s)
    far = domain * (domains - 1) * (cluster.nic_latency_s + message / cluster.shared_nic_bytes_per_s)
    return np.asarray(np.maximum(near, far))


def all_to_all_two_level(size_bytes: ArrayLike, cluster: ClusterSpec, gpus: int) -> Floats:
    """Exchange within the domain first, then between ranks of the same place in each domain.

    (d - 1) (alpha + n / d / B) over NVLink, then (D - 1) (alpha + n / D / B) over the NIC, D domains of d ranks: as
    many bytes between domains as the flat exchange, in d times fewer and larger messages (Tutel's 2DH).
    """
    domain, domains = _domains(cluster, gpus)
    size = _sizes(size_bytes)
    near = (domain - 1) * (cluster.near_latency_s + size / domain / cluster.near_bytes_per_s)
    far = (domains - 1) * (cluster.nic_latency_s + size / domains / cluster.shared_nic_bytes_per_s)
    return np.asarray(near + far)


def seconds(collective: Collective, cluster: ClusterSpec) -> Floats:
    """A collective by the better of the formulas above, over NVLink within one domain and over NICs otherwise."""
    size, gpus = collective.bytes, collective.gpus
    if collective.kind == "all_to_all":
        return np.minimum(all_to_all_flat(size, cluster, gpus), all_to_all_two_level(size, cluster, gpus))
    near = collective.nodes == 1 or gpus <= cluster.domain_gpus
    latency_s = cluster.near_latency_s if near else cluster.nic_latency_s
    rate = cluster.near_bytes_per_s if near else cluster.shared_nic_bytes_per_s
    if collective.kind == "all_reduce":
        return np.minimum(all_reduce_ring(size, gpus, latency_s, rate), all_reduce_tree(size, gpus, latency_s, rate))
    return all_gather_ring(size, gpus, latency_s, rate)


def _sizes(size_bytes: ArrayLike) -> Floats:
    return np.asarray(size_bytes, dtype=np.float64)


def _checked(ranks: int) -> int:
    if ranks < 1:
        raise BadInput(f"a collective of {ranks} ranks", mend="give at least 1")
    return ranks


def _domains(cluster: ClusterSpec, gpus: int) -> tuple[int, int]:
    """GPUs of a domain that take part, and domains. Raises BadInput where the domains are not filled alike."""
    domain = min(cluster.domain_gpus, _checked(gpus))
    if gpus % domain:
        raise BadInput(
            f"{gpus} GPUs do not fill NVLink domains of {domain}", mend="use whole domains, or fewer GPUs than one"
        )
    return domain, gpus // domain
