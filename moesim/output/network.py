"""Bytes that a step's dispatches and combines move: by phase, by link and between GPUs, ready for JSON."""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.engine.batch_rules import exchange_mode
from moesim.engine.simulate import Simulation
from moesim.errors import BadInput
from moesim.graph.batch import Floats, StepBatch
from moesim.graph.flows import STEPS, PhaseBytes, phase_bytes
from moesim.graph.pricing import Pricer


def network_json(pricer: Pricer, batch: StepBatch, counts: Floats, mode: str) -> dict[str, Any]:
    """Bytes of one step, all MoE layers together, dispatch and combine apart.

    batch, counts: of one step. by_phase: what GPUs send each other. by_link: bytes over every link that carries some,
    with the seconds that they take at its full rate. by_pair: [gpus][gpus], from row to column, all phases.
    """
    phases = phase_bytes(pricer, batch, counts, mode)
    return {step: _one([phase for phase in phases if phase.step == step]) for step in STEPS}


def of_simulation(simulation: Simulation, batch: StepBatch) -> dict[str, Any]:
    """`network_json` of a decode batch under the routing of the heaviest judged load, drawn.

    A cluster that is no topology (NVLink domains that split nodes) has no bytes, and the reason why.
    """
    routing = simulation.model.routing
    load = max(routing.for_phase("decode"), key=lambda one: float(routing.weights[one]))
    counts = routing.counts(load, batch.tokens.sum(axis=1), np.random.default_rng([simulation.seed, 9]))
    mode = exchange_mode(simulation.deployment, "decode")
    stages = simulation.deployment.setup.stages
    note = {} if stages is None else {"gpus_of": f"one of {stages.count} pipeline stages, the layers of all together"}
    try:
        return network_json(simulation.model.pricer, batch, counts, mode) | note
    except BadInput as error:
        return {**{step: {"bytes": None} for step in STEPS}, "reason": str(error)}


def _one(phases: list[PhaseBytes]) -> dict[str, Any]:
    sums = [phase.pairs.sum(axis=(0, 1)) for phase in phases]
    by_phase = [
        {"phase": phase.name, "level": phase.level, "bytes": float(pairs.sum())}
        for phase, pairs in zip(phases, sums, strict=True)
    ]
    links: list[dict[str, Any]] = []
    if phases:
        topology = phases[0].exchange.topology
        edges, loads = topology.link_loads(np.asarray(np.sum(sums, axis=0)))
        for edge, load, rate in zip(edges, loads.tolist(), topology.rates().tolist(), strict=True):
            if load > 0:
                links.append({"from": edge[0], "to": edge[1], "bytes": load, "full_rate_s": load / rate})
    return {
        "bytes": float(np.sum(sums)),
        "by_phase": by_phase,
        "by_link": links,
        "by_pair": np.sum(sums, axis=0).tolist() if sums else [],
    }
