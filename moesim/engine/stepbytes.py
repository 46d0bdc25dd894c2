"""Bytes of a step's exchanges, by GPU and by link of the cluster's topology."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.engine.deployment import Deployment
from moesim.network.topology import Crossing, Edge, Topology, build
from moesim.network.traffic import (
    LegCopies,
    Mode,
    fan_out_tag,
    low_latency_copies,
    message_bytes,
    normal_copies,
    pair_copies,
    visit_chances,
)
from moesim.units import BYTES_PER_ELEMENT

Floats = NDArray[np.float64]
# Exchanges whose bytes follow the routing; what a collective of its own sends over which link is its library's choice.
ROUTED_BACKENDS = ("deepep", "alltoall")


@dataclass(frozen=True)
class LinkLoad:
    """Bytes of a directed link in one step, dispatch and combine apart, and the seconds at its full rate for both."""

    link: Edge
    dispatch_bytes: float
    combine_bytes: float
    full_rate_s: float


@dataclass(frozen=True)
class StepBytes:
    """What a step's exchanges move.

    links: those that carry any, the longest busy first. endpoints: leg ("nic_out" ...) -> [gpus], dispatch and combine
    together. tag: where the number of copies comes from.
    """

    links: tuple[LinkLoad, ...]
    endpoints: dict[str, Floats]
    tag: str


def step_bytes(
    deployment: Deployment, tokens: Floats, counts: Floats, rank_loads: Floats, mode: str
) -> StepBytes | None:
    """Bytes of one step of the first instance; None for a dispatch whose bytes do not follow the routing.

    tokens: [gpus], which each sends; counts: [layers, experts]; rank_loads: [layers, ranks], rows that arrive on each.
    In DeepEP's normal mode copies are modelled from the counts (tag "assumed"), see `moesim.network.traffic`.
    """
    setup = deployment.setup
    backend = setup.policies.dispatch.backend
    if backend not in ROUTED_BACKENDS or setup.parallel.gpus == 1:
        return None
    shape: Mode = "normal" if backend == "deepep" and mode == "normal" else "low_latency"
    sizes = {step: _copy_bytes(deployment, step, shape) for step in ("dispatch", "combine")}
    pairs, legs = _copies(deployment, tokens, counts, rank_loads, shape)
    crossing: Crossing = "receiver" if shape == "normal" else "spine"
    topology = build(deployment.ground.cluster, crossing=crossing)
    out = _by_link(topology, [copies * sizes["dispatch"] for copies in pairs])
    back = _by_link(topology, [copies.T * sizes["combine"] for copies in pairs])
    found = [
        LinkLoad(link, out.get(link, 0.0), back.get(link, 0.0), _seconds(topology, link, out, back))
        for link in dict.fromkeys([*out, *back])
    ]
    there, returned = sizes["dispatch"], sizes["combine"]
    endpoints = {
        "nic_out": legs.nic_out * there + legs.nic_in * returned,
        "nic_in": legs.nic_in * there + legs.nic_out * returned,
        "nvlink_out": legs.nvlink_out * there + legs.nvlink_in * returned,
        "nvlink_in": legs.nvlink_in * there + legs.nvlink_out * returned,
    }
    ordered = tuple(sorted(found, key=lambda load: (-load.full_rate_s, load.link)))
    return StepBytes(ordered, endpoints, fan_out_tag(shape).label)


def _copy_bytes(deployment: Deployment, step: str, shape: Mode) -> float:
    setup = deployment.setup
    dtype = setup.precision.dispatch if step == "dispatch" else setup.precision.combine
    hidden, top_k = setup.model.hidden, setup.model.moe.top_k
    if setup.policies.dispatch.backend == "alltoall":
        return float(hidden * BYTES_PER_ELEMENT[dtype])
    return message_bytes(
        "dispatch" if step == "dispatch" else "combine", shape, hidden=hidden, dtype=dtype, top_k=top_k
    )


def _copies(
    deployment: Deployment, tokens: Floats, counts: Floats, rank_loads: Floats, shape: Mode
) -> tuple[list[Floats], LegCopies]:
    """Copies of all layers together: between GPUs in one or two hops [gpus, gpus], and by leg [gpus]."""
    setup = deployment.setup
    placement, moe, nodes = setup.placement, setup.model.moe, setup.nodes
    if shape == "low_latency":
        legs = low_latency_copies(tokens, rank_loads, nodes=nodes)
        return [pair_copies(tokens, rank_loads).sum(axis=0)], _summed(legs)
    by_rank, by_node = visit_chances(
        counts, placement, top_k=moe.top_k, groups=moe.groups, top_groups=moe.top_groups, nodes=nodes
    )
    legs = normal_copies(tokens, by_rank, by_node)
    ranks, each = len(tokens), len(tokens) // nodes
    node, place = np.arange(ranks) // each, np.arange(ranks) % each
    rail, forward = np.zeros((ranks, ranks)), np.zeros((ranks, ranks))
    by_place = np.bincount(place, weights=tokens, minlength=each)
    rank_visits, node_visits = by_rank.sum(axis=0), by_node.sum(axis=0)
    for source in range(ranks):
        twins = np.flatnonzero((place == place[source]) & (node != node[source]))
        rail[source, twins] = tokens[source] * node_visits[node[twins]]
        beside = np.flatnonzero((node == node[source]) & (place != place[source]))
        forward[source, beside] = by_place[place[source]] * rank_visits[beside]
    return [rail, forward], _summed(legs)


def _summed(legs: LegCopies) -> LegCopies:
    return LegCopies(*(np.asarray(leg.reshape(-1, leg.shape[-1]).sum(axis=0)) for leg in vars(legs).values()))


def _by_link(topology: Topology, pairs: Sequence[Floats]) -> dict[Edge, float]:
    """Bytes on each link of hops between the first GPUs of the cluster."""
    found: dict[Edge, float] = {}
    gpus = topology.cluster.gpus
    for hop in pairs:
        whole = np.zeros((gpus, gpus))
        whole[: len(hop), : len(hop)] = hop
        for link, size in topology.link_bytes(whole).items():
            found[link] = found.get(link, 0.0) + size
    return found


def _seconds(topology: Topology, link: Edge, *loads: dict[Edge, float]) -> float:
    rate = float(topology.graph.edges[link]["bytes_per_s"])
    return sum(load.get(link, 0.0) for load in loads) / rate
