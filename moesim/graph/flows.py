"""Bytes of a step's dispatches and combines: between which GPUs, over which level, phase by phase.

What a backend sends follows its own rule: DeepEP's copies and messages are in `network.traffic`, those of plain
all-to-alls in `graph.exchanges`. All-gather, reduce-scatter and all-reduce ignore routing; their bytes are those of
rings, one for each GPU of a domain, each of which leaves the domain over another GPU's NIC (NCCL's channels).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import BadInput
from moesim.graph.batch import Floats, StepBatch
from moesim.graph.deepep_links import deepep_copies, deepep_message, deepep_scheme
from moesim.graph.exchanges import ALL_TO_ALLS, Step, element_bytes, pair_bytes
from moesim.graph.pricing import Pricer
from moesim.network.exchange import Exchange, Level, Scheme
from moesim.network.instance import InstanceNetwork
from moesim.network.traffic import Mode
from moesim.units import BYTES_PER_ELEMENT

STEPS: tuple[Step, ...] = ("dispatch", "combine")
_SCHEMES: dict[str, Scheme] = {"two_level": "two_level"}  # the other plain all-to-alls go straight


@dataclass(frozen=True, eq=False)
class PhaseBytes:
    """One phase of a dispatch or combine: bytes between GPUs [steps, layers, gpus, gpus], the diagonal 0.

    exchange: whose topology they travel over.
    """

    step: Step
    name: str
    level: Level
    pairs: Floats
    exchange: Exchange


def phase_bytes(pricer: Pricer, batch: StepBatch, counts: Floats, mode: str) -> list[PhaseBytes]:
    """Every phase of the dispatches and combines of steps; nothing where nothing is exchanged.

    counts: [steps, layers, experts]; mode: as in `Pricer.price`. Raises BadInput without a network.
    """
    network = pricer.setup.network
    if network is None:
        raise BadInput("the setup names no network", mend="give LayerSetup.network")
    if pricer.setup.parallel.gpus == 1:
        return []
    backend = pricer.setup.policies.dispatch.backend
    if backend in ALL_TO_ALLS:
        return _all_to_all(pricer, network, batch, counts)
    if backend == "deepep":
        return _deepep(pricer, network, batch, counts, "low_latency" if mode == "low_latency" else "normal")
    return _rings(pricer, network, batch, len(counts))


def _sent(pricer: Pricer, batch: StepBatch) -> Floats:
    """Tokens that each GPU sends: [steps, gpus]."""
    tp = pricer.setup.parallel.tp
    return np.repeat(batch.tokens / tp, tp, axis=1)


def _all_to_all(pricer: Pricer, network: InstanceNetwork, batch: StepBatch, counts: Floats) -> list[PhaseBytes]:
    setup = pricer.setup
    parallel, dispatch = setup.parallel, setup.policies.dispatch
    exchange = network.paths(_SCHEMES.get(dispatch.backend, "flat"))
    arriving = pricer.rank_loads(batch, counts)
    found = []
    for step in STEPS:
        row_bytes = setup.model.hidden * element_bytes(step, dispatch, setup.precision)
        pairs = pair_bytes(_sent(pricer, batch), arriving, parallel, row_bytes)
        loads = exchange.loads(pairs, backwards=step == "combine")
        found += [PhaseBytes(step, name, level, load, exchange) for name, level, load in loads]
        if parallel.expert_tp > 1:
            # A ring in the expert's group carries all parts but one over each of its links.
            width = BYTES_PER_ELEMENT[setup.precision.activations] * setup.model.hidden
            whole = arriving * width * (parallel.expert_tp - 1) / parallel.expert_tp
            rank = np.arange(parallel.gpus)
            following = rank // parallel.expert_tp * parallel.expert_tp + (rank + 1) % parallel.expert_tp
            ring = np.zeros_like(pairs)
            ring[..., rank, following] = whole[..., rank // parallel.expert_tp]
            name = "gather of an expert's parts" if step == "dispatch" else "scatter of an expert's parts"
            near: Level = "nvlink" if network.cluster.nvlink_bytes_per_s else "pcie"
            found.append(PhaseBytes(step, name, near, ring, exchange))
    return found


def _deepep(pricer: Pricer, network: InstanceNetwork, batch: StepBatch, counts: Floats, mode: Mode) -> list[PhaseBytes]:
    setup = pricer.setup
    exchange = network.paths(deepep_scheme(mode))
    arriving = pricer.rank_loads(batch, counts)
    copies = deepep_copies(
        network,
        setup.model,
        setup.placement,
        mode,
        sent=_sent(pricer, batch),
        arriving=arriving,
        counts=counts,
    )
    pairs, domains = copies.pairs(slice(None))
    found = []
    for step in STEPS:
        size = deepep_message(step, mode, setup.model, setup.precision)
        to_domains = None if domains is None else domains * size
        loads = exchange.loads(pairs * size, to_domains, backwards=step == "combine")
        found += [PhaseBytes(step, name, level, load, exchange) for name, level, load in loads]
    return found


def _rings(pricer: Pricer, network: InstanceNetwork, batch: StepBatch, steps: int) -> list[PhaseBytes]:
    """Rings over all GPUs: a reduction goes round twice, a gather or scatter once."""
    setup = pricer.setup
    parallel, exchange = setup.parallel, network.paths("flat")
    rows = batch.padded_tokens.max(axis=1) * setup.model.hidden * BYTES_PER_ELEMENT[setup.precision.activations]
    reduces = setup.policies.dispatch.backend == "allreduce"
    once = np.broadcast_to(rows * (1 if reduces else parallel.attention_dp), (steps,))
    pairs = _ring_pairs(parallel.gpus, min(network.cluster.domain_gpus, parallel.gpus))
    size = once * (parallel.gpus - 1) / parallel.gpus * (2.0 if reduces else 1.0)
    loads = np.broadcast_to(
        size[:, None, None, None] * pairs, (steps, setup.model.moe_layers, parallel.gpus, parallel.gpus)
    )
    names: dict[Step, tuple[str, float]] = {"combine": ("ring all-reduce", 1.0)}
    if not reduces:
        names = {
            "dispatch": ("ring all-gather", setup.precision.gathered_share),
            "combine": ("ring reduce-scatter", 1.0),
        }
    return [
        PhaseBytes(step, f"{name}, {part}", level, load, exchange)
        for step, (name, share) in names.items()
        for part, level, load in exchange.loads(loads * share)
    ]


def _ring_pairs(gpus: int, domain: int) -> Floats:
    """Share of the rings that goes from one GPU to another: [gpus, gpus]; one ring for each GPU of a domain."""
    found = np.zeros((gpus, gpus))
    gpu = np.arange(gpus)
    first = gpu // domain * domain
    domains = gpus // domain
    inside = 1.0 if domains == 1 else (domain - 1) / domain
    if domain > 1:
        found[gpu, first + (gpu - first + 1) % domain] += inside
    if domains > 1:
        found[gpu, (gpu + domain) % gpus] += 1.0 / domain
    return found
