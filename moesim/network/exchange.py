"""How long an exchange takes: bytes of every pair of GPUs to seconds, phase by phase, by the busiest endpoint or link.

Schemes: "flat", every copy goes straight, NVLink inside the domain and the NIC to the rest, both at once (pairwise
exchange, Thakur et al. 2005). "two_level": gathered inside the domain on the GPU whose NIC is the destination's rail,
along the rails, then scattered (Tutel, arXiv:2206.03382; DeepSpeed-MoE, arXiv:2201.05596). "deepep_normal": one copy to
each destination node along the sender's rail, forwarded over NVLink from there, both at once. "deepep_low_latency": one
copy for each pick, straight to its GPU; "deepep_low_latency_network": the same, over the NICs inside a node too, as the
first version did (deepseek-ai/DeepEP, README and csrc/kernels).

A phase takes alpha of its level for each message that a GPU sends or receives one after the other, and the time of the
busiest link. Pairwise schemes send message after message; DeepEP posts all of them at once, so that alpha counts once.
No phase is quicker than the busiest link of its bytes, and neither is the whole exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import Tag
from moesim.errors import BadInput
from moesim.network.topology import Crossing, Inside, Topology, build
from moesim.spec.cluster import ClusterSpec, LinkFigure

Floats = NDArray[np.float64]
Scheme = Literal["flat", "two_level", "deepep_normal", "deepep_low_latency", "deepep_low_latency_network"]
SCHEMES: tuple[Scheme, ...] = (
    "flat", "two_level", "deepep_normal", "deepep_low_latency", "deepep_low_latency_network",
)  # fmt: skip
Level = Literal["nvlink", "pcie", "nic"]
Order = Literal["one_after_another", "at_once", "pipeline"]
ORDER_TWO_LEVEL: Order = "one_after_another"
ORDER_DEEPEP_NORMAL: Order = "pipeline"
ORDER_STRAIGHT: Order = "at_once"
_ORDERS: dict[Scheme, Order] = {"two_level": ORDER_TWO_LEVEL, "deepep_normal": ORDER_DEEPEP_NORMAL}
# A phase before it is priced: its name, level and bytes [..., gpus, gpus].
Load = tuple[str, Level, Floats]
# By how much bytes to a domain may exceed the sum over its GPUs: rounding only.
ROUNDING = 1e-9
# The schemes whose messages follow one another; the others post all at once.
ONE_BY_ONE: tuple[Scheme, ...] = ("flat", "two_level")


@dataclass(frozen=True)
class Phase:
    """A part of an exchange over one level: latency_s and transfer_s [...]; tag: whether its figures were measured."""

    name: str
    level: Level
    latency_s: Floats
    transfer_s: Floats
    tag: Tag

    @property
    def seconds(self) -> Floats:
        """Both together [...]."""
        return np.asarray(self.latency_s + self.transfer_s)


@dataclass(frozen=True)
class ExchangeTime:
    """seconds [...], the phases that make it, and how they follow: one after the other, at once, or as a pipeline."""

    seconds: Floats
    phases: tuple[Phase, ...]
    order: Order
    tag: Tag


@dataclass(frozen=True, eq=False)
class Exchange:
    """A cluster under one scheme, ready for any number of loads; `prepare` makes it."""

    scheme: Scheme
    topology: Topology

    def time(self, pair_bytes: Floats, node_bytes: Floats | None = None, *, backwards: bool = False) -> ExchangeTime:
        """Seconds of exchanges of pair_bytes [..., gpus, gpus], from row to column; the diagonal stays and costs 0.

        node_bytes: [..., gpus, domains], for deepep_normal: bytes that each GPU sends to each NVLink domain (a token
        goes once to each, however many of its GPUs it visits); without it, no token visits two GPUs of one. backwards:
        a combine, whose bytes run against these. Raises BadInput for another shape, for values that are negative or not
        finite, and for more bytes to a domain than to its GPUs together.
        """
        loads = self.loads(pair_bytes, node_bytes, backwards=backwards)
        order = _ORDERS.get(self.scheme, ORDER_STRAIGHT)
        phases = tuple(self._phase(name, level, load) for name, level, load in loads)
        moved = [load for _, _, load in loads]
        seconds = _seconds(phases, order)
        if order != "one_after_another":  # phases that share a link (PCIe to GPUs and to the NIC) wait for each other
            seconds = np.maximum(seconds, self.topology.busiest_s(np.sum(moved, axis=0)))
        tags = [phase.tag for phase in phases if phase.seconds.any()]
        return ExchangeTime(seconds, phases, order, max(tags, default=Tag.FORMULA))

    def loads(self, pair_bytes: Floats, node_bytes: Floats | None = None, *, backwards: bool = False) -> list[Load]:
        """The same bytes phase by phase: name, level and what travels between two GPUs [..., gpus, gpus], diagonal 0.

        Arguments and errors as in `time`.
        """
        pairs = self._checked(pair_bytes)
        if self.scheme == "two_level":
            loads = self._two_level(pairs)
        elif self.scheme == "deepep_normal":
            loads = self._deepep_normal(pairs, node_bytes)
        else:
            loads = self._straight(pairs)
        moved = [(name, level, _without_own(load)) for name, level, load in loads]
        return [(name, level, np.swapaxes(load, -1, -2)) for name, level, load in moved] if backwards else moved

    def _straight(self, pairs: Floats) -> list[Load]:
        """Each copy on its own way: the near ones and the far ones at once."""
        near = self._near_mask() if self.topology.inside == "links" else np.zeros(pairs.shape[-2:], dtype=bool)
        return [
            ("inside the domain", self._near_level(), pairs * near),
            ("between domains", "nic", pairs * ~near),
        ]

    def _two_level(self, pairs: Floats) -> list[Load]:
        """Gather on the relay of the destination's rail, go along the rails, scatter."""
        flat = pairs.reshape(-1, pairs.shape[-1] ** 2)
        gather, along, scatter = ((flat @ moves).reshape(pairs.shape) for moves in self._moves())
        near = self._near_level()
        return [
            ("gather inside the domain", near, gather),
            ("along the rails", "nic", along),
            ("scatter inside the domain", near, scatter),
        ]

    def _moves(self) -> tuple[Any, Any, Any]:
        """Which pair's bytes travel between which pair in each phase of two_level: sparse [pairs, pairs] each."""
        from scipy.sparse import csr_array

        topology, gpus = self.topology, self.topology.cluster.gpus
        rail = np.asarray([topology.nic(gpu) for gpu in range(gpus)])
        relays = np.asarray([[topology.relay(gpu, nic) for nic in sorted(set(rail))] for gpu in range(gpus)])
        column = np.searchsorted(sorted(set(rail)), rail)
        source, destination = (axis.ravel() for axis in np.indices((gpus, gpus)))
        leaves, arrives = relays[source, column[destination]], relays[destination, column[destination]]
        near = self._near_mask().ravel()
        pair = source * gpus + destination

        def moved(begin: NDArray[np.int64], end: NDArray[np.int64], which: NDArray[np.bool_]) -> Any:
            ones = np.ones(int(which.sum()))
            return csr_array((ones, (pair[which], (begin * gpus + end)[which])), shape=(gpus**2, gpus**2))

        every = np.ones(len(pair), dtype=bool)
        return (
            moved(source, np.where(near, destination, leaves), every),
            moved(leaves, arrives, ~near),
            moved(arrives, destination, ~near),
        )

    def _deepep_normal(self, pairs: Floats, node_bytes: Floats | None) -> list[Load]:
        """One copy to each domain at the sender's own place there, forwarded from that place to each GPU visited."""
        cluster, lead = self.topology.cluster, pairs.shape[:-2]
        each = min(cluster.domain_gpus, cluster.gpus)
        domains = cluster.gpus // each
        grid = pairs.reshape(*lead, domains, each, domains, each)  # sender's domain and place, receiver's
        upper = grid.sum(axis=-1)
        sent = upper if node_bytes is None else _to_domains(node_bytes, upper)
        rail, forward = np.zeros_like(grid), np.zeros_like(grid)
        place, domain = np.arange(each), np.arange(domains)
        # Axes that arrays index come first: [places, ..., domains, domains] and [domains, ..., places, places].
        rail[..., :, place, :, place] = np.moveaxis(sent * (1.0 - np.eye(domains)[:, None, :]), -2, 0)
        forward[..., domain, :, domain, :] = np.moveaxis(grid.sum(axis=-4), -2, 0)
        return [
            ("along the rails", "nic", rail.reshape(pairs.shape)),
            ("forward inside the domain", self._near_level(), forward.reshape(pairs.shape)),
        ]

    def _phase(self, name: str, level: Level, load: Floats) -> Phase:
        cluster = self.topology.cluster
        alpha = cluster.nic_latency_s if level == "nic" else cluster.near_latency_s
        messages = np.maximum((load > 0).sum(axis=-1).max(axis=-1), (load > 0).sum(axis=-2).max(axis=-1))
        rounds = messages if self.scheme in ONE_BY_ONE else np.minimum(messages, 1)
        return Phase(name, level, np.asarray(alpha * rounds), self.topology.busiest_s(load), _tag(cluster, level))

    def _near_level(self) -> Level:
        return "nvlink" if self.topology.cluster.nvlink_bytes_per_s else "pcie"

    def _near_mask(self) -> NDArray[np.bool_]:
        domain = np.asarray([self.topology.domain(gpu) for gpu in range(self.topology.cluster.gpus)])
        return np.asarray(domain[:, None] == domain[None, :])

    def _checked(self, pair_bytes: Floats) -> Floats:
        pairs = np.asarray(pair_bytes, dtype=np.float64)
        gpus = self.topology.cluster.gpus
        if pairs.ndim < 2 or pairs.shape[-2:] != (gpus, gpus):
            raise BadInput(f"bytes of shape {pairs.shape} for {gpus} GPUs", mend="give [..., gpus, gpus]")
        if not (np.isfinite(pairs) & (pairs >= 0.0)).all():
            raise BadInput("bytes between two GPUs are negative or not finite", mend="give finite bytes of at least 0")
        return pairs


def _to_domains(node_bytes: Floats, upper: Floats) -> Floats:
    """Bytes of each GPU to each domain, checked, in the shape of `upper` [..., domains, places, domains]."""
    given = np.asarray(node_bytes, dtype=np.float64)
    wanted = (*upper.shape[:-3], upper.shape[-3] * upper.shape[-2], upper.shape[-1])
    if given.shape != wanted:
        raise BadInput(f"bytes to domains of shape {given.shape}", mend=f"give {list(wanted)}")
    grid = given.reshape(upper.shape)
    if not (np.isfinite(grid) & (grid >= 0.0) & (grid <= upper * (1.0 + ROUNDING))).all():
        raise BadInput(
            "bytes to a domain are negative, not finite or more than to its GPUs together", mend="count a token once"
        )
    return grid


def _seconds(phases: tuple[Phase, ...], order: Order) -> Floats:
    parts = [phase.seconds for phase in phases]
    if order == "one_after_another":
        return np.asarray(np.sum(parts, axis=0))
    if order == "at_once":
        return np.asarray(np.max(parts, axis=0))
    # A pipeline: the last token has waited for every latency, and for the slowest stage.
    slowest = np.max([phase.transfer_s for phase in phases], axis=0)
    return np.asarray(np.sum([phase.latency_s for phase in phases], axis=0) + slowest)


def prepare(cluster: ClusterSpec, scheme: Scheme) -> Exchange:
    """An exchange over a cluster's topology.

    Raises BadInput for an unknown scheme, for GPUs that do not fill domains where it takes that, and as
    `topology.build` does.
    """
    if scheme not in SCHEMES:
        raise BadInput(f"unknown scheme {scheme!r}", mend=f"use one of: {', '.join(SCHEMES)}")
    if scheme == "deepep_normal" and cluster.gpus > cluster.domain_gpus and cluster.gpus % cluster.domain_gpus:
        raise BadInput(
            f"{cluster.gpus} GPUs do not fill NVLink domains of {cluster.domain_gpus}, which {scheme} takes",
            mend="use whole domains, or fewer GPUs than one",
        )
    inside: Inside = "network" if scheme == "deepep_low_latency_network" else "links"
    crossing: Crossing = "receiver" if scheme == "deepep_normal" else "spine"
    return Exchange(scheme, build(cluster, crossing=crossing, inside=inside))


def _tag(cluster: ClusterSpec, level: Level) -> Tag:
    """A formula on measured figures is a formula; on assumed ones it is assumed."""
    figures: tuple[LinkFigure, ...] = {
        "nvlink": ("nvlink_bytes_per_s", "nvlink_latency_s"),
        "pcie": ("pcie_bytes_per_s", "pcie_latency_s"),
        "nic": ("nic_bytes_per_s", "nic_latency_s"),
    }[level]  # type: ignore[assignment]
    return Tag.FORMULA if all(name in cluster.measured for name in figures) else Tag.ASSUMED


def _without_own(pairs: Floats) -> Floats:
    gpus = pairs.shape[-1]
    return np.asarray(pairs * (1.0 - np.eye(gpus)))
