"""Bytes of a step's exchanges, by GPU and by link of the cluster's topology."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.graph.batch import StepBatch
from moesim.graph.exchanges import ALL_TO_ALLS
from moesim.graph.flows import phase_bytes
from moesim.graph.pricing import Pricer
from moesim.network.topology import Edge, Topology
from moesim.network.traffic import fan_out_tag

Floats = NDArray[np.float64]
# Exchanges whose bytes follow the routing; what a collective of its own sends over which link is its library's choice.
ROUTED_BACKENDS = ("deepep", *ALL_TO_ALLS)


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


def step_bytes(pricer: Pricer, routed: Sequence[tuple[StepBatch, Floats]], mode: str) -> StepBytes | None:
    """Bytes of one step, its mean where a batch has several; None for a dispatch whose bytes do not follow the routing.

    routed: micro-batches with their counts [steps, layers, experts]; see `phase_bytes`, and there too what is modelled.
    None as well for NVLink domains that split nodes, which are no topology.
    """
    setup = pricer.setup
    backend = setup.policies.dispatch.backend
    if backend not in ROUTED_BACKENDS or setup.parallel.gpus == 1:
        return None
    by_step: dict[str, Floats] = {}
    endpoints: dict[str, Floats] = {}
    topology: Topology | None = None
    for batch, counts in routed:
        try:
            phases = phase_bytes(pricer, batch, counts, mode)
        except BadInput:
            return None
        for phase in phases:
            pairs = phase.pairs.sum(axis=1).mean(axis=0)
            topology = phase.exchange.topology
            by_step[phase.step] = by_step.get(phase.step, 0.0) + pairs
            for leg, axis in (("out", 1), ("in", 0)):
                name = f"{phase.level}_{leg}"
                endpoints[name] = endpoints.get(name, 0.0) + pairs.sum(axis=axis)
    assert topology is not None
    edges, out = topology.link_loads(by_step["dispatch"])
    _, back = topology.link_loads(by_step["combine"])
    found = [
        LinkLoad(edge, there, returned, (there + returned) / rate)
        for edge, there, returned, rate in zip(
            edges, out.tolist(), back.tolist(), topology.rates().tolist(), strict=True
        )
        if there + returned > 0
    ]
    ordered = tuple(sorted(found, key=lambda load: (-load.full_rate_s, load.link)))
    return StepBytes(
        ordered,
        endpoints,
        fan_out_tag("normal" if backend == "deepep" and mode != "low_latency" else "low_latency").label,
    )
