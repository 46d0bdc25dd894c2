"""What routing did in a run: what was dropped, rerouted and padded, and how evenly experts were used."""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.engine.batch_rules import exchange_mode
from moesim.engine.simulate import Simulation, typical_decode, weighted_mean
from moesim.graph.batch import StepBatch, step_batch
from moesim.graph.pricing import capacity_sources
from moesim.routing.capacity.kernel import aligned_rows
from moesim.routing.capacity.on_counts import CountFlow, cap_counts
from moesim.routing.gates.choice import gate_spec
from moesim.routing.gates.routed import Floats
from moesim.routing.spread import UTILISATION_EDGES, routing_entropy, utilisation_histogram

# Steps drawn for each judged load of a phase.
STEPS = 8


def routing_json(simulation: Simulation) -> dict[str, Any]:
    """Fractions of all picks of the run, decode and prefill weighted by their tokens, and the figures of each phase.

    Every phase is told at its typical step. Keys: gate, dropped_fraction, rerouted_fraction (of the picks),
    padded_fraction (empty rows of all rows computed), entropy (1 is even), utilisation {edges, share of experts},
    capacity {rule, tag}, by_phase.
    """
    served = simulation.served
    tokens = {"decode": int(served.step_decode_seqs.sum()), "prefill": int(served.step_prefill_tokens.sum())}
    phases = {kind: _phase(simulation, kind) for kind, count in tokens.items() if count}
    weights = np.asarray([tokens[kind] for kind in phases], dtype=np.float64)

    def mean(key: str) -> float:
        return float(np.average([found[key] for found in phases.values()], weights=weights))

    histogram = np.average([found["utilisation"] for found in phases.values()], axis=0, weights=weights)
    spec = gate_spec(simulation.deployment.scenario.policies.gate)
    rule = simulation.model.pricer.capacity
    return {
        "gate": "model" if spec is None else spec.name,
        "dropped_fraction": mean("dropped_fraction"),
        "rerouted_fraction": mean("rerouted_fraction"),
        "padded_fraction": mean("padded_fraction"),
        "entropy": mean("entropy"),
        "utilisation": {"edges": list(UTILISATION_EDGES), "share": histogram.tolist()},
        "capacity": {
            "rule": rule.rule,
            "drop": None if rule.dropless else rule.drop,
            "tag": "assumed" if any(found.pop("tag") == "assumed" for found in list(phases.values())) else "formula",
        },
        "by_phase": phases,
    }


def _phase(simulation: Simulation, kind: str) -> dict[str, Any]:
    model = simulation.model
    batch = typical_decode(simulation) if kind == "decode" else typical_prefill(simulation)
    rows = batch.half().tokens if simulation.deployment.setup.policies.schedule == "two_batch" else batch.tokens
    rng = np.random.default_rng([simulation.seed, 10 if kind == "decode" else 11])
    loads = model.routing.for_phase(kind)
    counts = [model.routing.counts(load, np.full(STEPS, rows.sum()), rng) for load in loads]
    weights = np.repeat(model.routing.weights[loads], STEPS)
    every = np.concatenate(counts)
    top_k = simulation.deployment.setup.model.moe.top_k
    source = np.repeat(capacity_sources(simulation.deployment.setup, rows), len(every), axis=0)
    flow = cap_counts(every, source, model.pricer.capacity, top_k=top_k)
    return {
        "tokens_per_dp_rank": float(rows.mean()),
        **flow_figures(flow, every, weights, dropless=model.pricer.capacity.dropless),
        "kernel_padded_fraction": _kernel_padding(simulation, kind, flow, weights),
    }


def flow_figures(flow: CountFlow, wanted: Floats, weights: Floats, *, dropless: bool) -> dict[str, Any]:
    """What a capacity rule did to picks `wanted` [steps, layers, experts], steps weighted; by layer and by expert too.

    Without a rule the latter are left out: they are all 0.
    """
    found = {
        "dropped_fraction": _share(flow.dropped, wanted, weights),
        "rerouted_fraction": _share(flow.rerouted, wanted, weights),
        "padded_fraction": _share(flow.padded, flow.rows, weights),
        "entropy": float(np.average(routing_entropy(flow.processed).mean(axis=1), weights=weights)),
        "entropy_by_layer": np.average(routing_entropy(flow.processed), axis=0, weights=weights).tolist(),
        "utilisation": utilisation_histogram(flow.processed).tolist(),
        "tag": flow.tag,
    }
    if dropless:
        return found
    for name, part, whole in (
        ("dropped", flow.dropped, wanted),
        ("rerouted", flow.rerouted, wanted),
        ("padded", flow.padded, flow.rows),
    ):
        found[f"{name}_by_layer"] = _ratio(part, whole, weights, (0, 2)).tolist()
        found[f"{name}_by_expert"] = _ratio(part, whole, weights, (0, 1)).tolist()
    return found


def typical_prefill(simulation: Simulation) -> StepBatch:
    """The reading step that the run spent its time in: one rank with a whole prompt, the others with what is left."""
    served = simulation.served
    reading = served.step_prefill_tokens > 0
    ranks = simulation.deployment.setup.parallel.attention_dp
    total = weighted_mean((served.step_decode_seqs + served.step_prefill_tokens)[reading], served.step_s[reading])
    longest = min(float(simulation.load.isl.mean()), float(simulation.model.limits.max_tokens), total)
    longest = max(longest, total / ranks)
    rows = np.full((1, ranks), (total - longest) / (ranks - 1) if ranks > 1 else total)
    rows[0, 0] = longest
    return step_batch(ranks=ranks, prefill_seqs=1.0, prefill_new=rows)


def _kernel_padding(simulation: Simulation, kind: str, flow: CountFlow, weights: Floats) -> float:
    """Empty rows of all rows in DeepEP's contiguous layout; 0 for layouts that keep no extra rows."""
    setup = simulation.deployment.setup
    contiguous = setup.policies.dispatch.backend == "deepep" and exchange_mode(simulation.deployment, kind) == "normal"
    if not contiguous:
        return 0.0
    slots = simulation.model.pricer.replicas.slot_loads(flow.rows)
    rows = aligned_rows(slots)
    return _share(rows - slots, rows, weights)


def _share(part: Floats, whole: Floats, weights: Floats) -> float:
    return float(_ratio(part, whole, weights, (0, 1, 2)))


def _ratio(part: Floats, whole: Floats, weights: Floats, axes: tuple[int, ...]) -> Floats:
    """Sum of `part` over that of `whole` [steps, layers, experts or slots], steps weighted; 0 where there is none."""
    scale = weights[:, None, None]
    total = (whole * scale).sum(axis=axes)
    return np.asarray((part * scale).sum(axis=axes) / np.where(total > 0, total, 1.0))
