"""The contract's figures of a simulation, as one JSON-ready mapping."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import Estimate, Tag
from moesim.engine.batch_rules import flow_of
from moesim.engine.draws import LEVEL, interval
from moesim.engine.overheads import overheads_json
from moesim.engine.serving import Served
from moesim.engine.simulate import Simulation, typical_decode, weighted_mean
from moesim.graph.batch import step_batch
from moesim.graph.priced_step import LayerSetup, Part, PricedStep
from moesim.output.dispersion_report import dispersion_json
from moesim.output.network import of_simulation
from moesim.output.priced import priced_json
from moesim.output.routing_report import routing_json
from moesim.output.serving_report import serving_report
from moesim.output.steady import steadiness
from moesim.output.step_figures import step_figures
from moesim.routing.trace import stack_profiles
from moesim.spec.plan import max_over_mean
from moesim.spec.scenario import Scenario

SCHEMA_VERSION = 1
# Families whose prices a store takes from its tables alone; experts beyond the balanced rows and prompts after a prefix
# are formulas on measured prices.
_MEASURED_WHOLE = ("collective", "dispatch", "gemm")
STATISTICS = ("mean", "p50", "p90", "p99")


def latency(values: NDArray[np.float64]) -> dict[str, float]:
    """Mean and percentiles of latencies in seconds; zeros where there are none (one-token outputs have no gaps)."""
    if values.size == 0:
        return dict.fromkeys(STATISTICS, 0.0)
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {"mean": float(values.mean()), "p50": float(p50), "p90": float(p90), "p99": float(p99)}


def latency_of_runs(values: NDArray[np.float64], counts: NDArray[np.int64]) -> dict[str, float]:
    """`latency` of values that came so often each: the same figures, without writing them all out."""
    total = int(counts.sum())
    if total == 0:
        return dict.fromkeys(STATISTICS, 0.0)
    order = np.argsort(values)
    ordered, ends = values[order], np.cumsum(counts[order])
    found = {"mean": float(values @ counts) / total}
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        place = share * (total - 1)
        low, high = (
            float(ordered[np.searchsorted(ends, index, side="right")])
            for index in (int(place), min(int(place) + 1, total - 1))
        )
        found[name] = low + (high - low) * (place - int(place))
    return found


def serving_metrics(served: Served, gpus: int) -> dict[str, Any]:
    """Rates over the simulated time, all requests counted; TPOT leaves out the first token."""
    done = np.isfinite(served.finish_s)
    seconds = served.duration_s
    rates = {
        "input_tokens_per_s": float(served.isl[done].sum()) / seconds,
        "output_tokens_per_s": float(served.osl[done].sum()) / seconds,
    }
    rates["total_tokens_per_s"] = sum(rates.values())
    later = done & (served.osl > 1)
    tpot = (served.finish_s - served.first_token_s)[later] / (served.osl[later] - 1)
    found = {
        "requests_completed": int(done.sum()),
        "duration_s": seconds,
        **rates,
        **{f"{name}_per_gpu": value / gpus for name, value in rates.items()},
        "ttft_s": latency((served.first_token_s - served.arrival_s)[done]),
        "tpot_s": latency(tpot),
        "itl_s": latency_of_runs(served.gap_s, served.gap_n),
        "e2e_s": latency((served.finish_s - served.arrival_s)[done]),
    }
    return found if served.prefill is None else {**found, "roles": role_metrics(served)}


def role_metrics(served: Served) -> dict[str, Any]:
    """By role: prefill's time to a read prompt and how busy it is, the transfer, decode's token times."""
    side = served.prefill
    assert side is not None
    read = side.served
    moved = side.transfer_s[np.isfinite(side.transfer_s)]
    later = served.osl > 1
    tpot = (served.finish_s - served.first_token_s)[later] / (served.osl[later] - 1)
    return {
        "prefill": {
            "ttft_s": latency(read.first_token_s - read.arrival_s),
            "input_tokens_per_s": float(served.isl.sum()) / served.duration_s,
            "busy": busy_share(read, served.duration_s),
        },
        "decode": {
            "tpot_s": latency(tpot),
            "itl_s": latency_of_runs(served.gap_s, served.gap_n),
            "output_tokens_per_s": float(served.osl.sum()) / served.duration_s,
            "busy": busy_share(served, served.duration_s),
        },
        "transfer": {"transfer_s": latency(moved), "bytes_per_s": side.transfer_bytes / served.duration_s},
    }


def busy_share(served: Served, duration_s: float) -> float:
    """Share of a run in which an instance of a pool was in a step, mean over the instances that had any.

    With pipeline stages, of the busiest stage.
    """
    if served.stage_busy_s is not None:
        return float(served.stage_busy_s.mean(axis=0).max()) / duration_s
    instances = len(np.unique(served.step_instance))
    return float(served.step_s.sum()) / duration_s / instances if instances else 0.0


def flatten(metrics: dict[str, Any]) -> dict[str, float]:
    """Dotted names: `tpot_s.p99`; a latency's bare name is its mean."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict) and "mean" not in value:
            found.update({f"{name}.{key}": number for key, number in flatten(value).items()})
        elif isinstance(value, dict):
            found[name] = value["mean"]
            found.update({f"{name}.{key}": float(number) for key, number in value.items()})
        else:
            found[name] = float(value)
    return found


def intervals(drawn: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Central intervals over the joint draws, by dotted metric name; empty without draws."""
    if not drawn:
        return {}
    flat = [flatten(one) for one in drawn]
    found = {}
    for name in flat[0]:
        low, high = interval(np.asarray([one[name] for one in flat]))
        found[name] = {"low": low, "high": high, "level": LEVEL}
    return found


def step_seconds(
    setup: LayerSetup, priced: PricedStep, steps: NDArray[np.int64] | None = None
) -> dict[tuple[str, str], float]:
    """Seconds of a step by (cost family, tag), mean over ranks and steps (of all, or of some), all layers counted."""
    model, hops = setup.model, 0 if setup.stages is None else len(setup.stages.hops)
    times = {
        "projections": model.layers,
        "attention": model.layers,
        "attention_sync": model.layers,
        "context_gather": model.layers,
        "context_merge": model.layers,
        "eager": model.layers,
        "gate": model.moe_layers,
        "shared": model.moe_layers,
        "replica_choice": model.moe_layers,
        "dispatch": model.moe_layers * priced.chunks,
        "experts": model.moe_layers * priced.chunks,
        "combine": model.moe_layers * priced.chunks,
        "fetch": model.moe_layers,
        "gather": model.moe_layers,
        "dense": model.dense_layers,
        "dense_sync": model.dense_layers,
        "transfer": hops,
        "arrival": hops,
    }
    found: dict[tuple[str, str], float] = {}
    for name, part in vars(priced).items():
        for one in part.estimates if isinstance(part, Part) else ():
            for tag, seconds in _by_tag(one, steps).items():
                key = (one.family, tag)
                found[key] = found.get(key, 0.0) + seconds * times.get(name, 1)
    return found


def _by_tag(one: Estimate, steps: NDArray[np.int64] | None) -> dict[str, float]:
    if one.tags.size and (one.tags == one.tags.flat[0]).all():
        chosen = one.seconds if steps is None or one.seconds.shape[0] == 1 else one.seconds[steps]
        return {Tag(int(one.tags.flat[0])).label: float(chosen.mean())}
    seconds, tags = one.seconds, np.broadcast_to(one.tags, one.seconds.shape)
    if steps is not None and seconds.shape[0] > 1:
        seconds, tags = seconds[steps], tags[steps]
    return {Tag(int(tag)).label: float((seconds * (tags == tag)).mean()) for tag in np.unique(tags)}


def simulation_json(simulation: Simulation) -> dict[str, Any]:
    """Everything that `simulate --json` prints; all that depends on the machine's clock is under `run`."""
    deployment = simulation.deployment
    setup, cluster = deployment.setup, deployment.ground.cluster
    served = simulation.served
    metrics = serving_metrics(served, cluster.gpus)
    batch = typical_decode(simulation)
    step = step_figures(simulation, batch)
    network = of_simulation(simulation, batch)
    profiles, weights = stack_profiles(deployment.ground.judge)
    replicas = simulation.model.pricer.replicas
    loads = replicas.average_rank_loads(np.tensordot(weights, profiles, axes=1))
    routing = simulation.model.routing
    rng = np.random.default_rng([simulation.seed, 7])
    decoding = routing.for_phase("decode")
    per_step = []
    for load in decoding:
        counts = routing.counts(load, np.full(8, batch.tokens.sum()), rng)
        per_step.append(max_over_mean(replicas.rank_loads(counts)).mean())
    return {
        "schema_version": SCHEMA_VERSION,
        "metrics": metrics,
        "intervals": intervals([serving_metrics(one, cluster.gpus) for one in simulation.drawn]),
        "step": {
            "tokens_per_dp_rank": float(batch.tokens.mean()),
            **step,
            "communication_bytes": {name: network[name]["bytes"] for name in ("dispatch", "combine")},
        },
        "routing": {
            "max_over_mean": float(max_over_mean(loads).mean()),
            "per_step_max_over_mean": float(np.average(per_step, weights=routing.weights[decoding])),
            **routing_json(simulation),
            "dispersion": routing.dispersion.tag,
            "dispersion_parts": dispersion_json(routing),
            "judged_on": [load.name for load in deployment.ground.judge],
            "judged_on_fit": deployment.ground.judged_on_fit,
            "generated": generated(deployment.scenario),
        },
        "network": network,
        "memory": _memory(simulation),
        "slo": slo_report(metrics, deployment.scenario.objective.slo.limits()),
        "load": steadiness(simulation).to_json(),
        "serving": serving_report(simulation),
        "provenance": provenance(simulation),
        "priced_by": priced_json(deployment.ground.costs, deployment.scenario.cost.source, outside_share(simulation)),
        "overheads": overheads_json(deployment.rules),
        "plan": {
            "parallel": deployment.parallel.model_dump(mode="json"),
            "instances": deployment.instances,
            "solver": setup.placement.solver,
            "redundant_experts": setup.placement.redundant,
            "schedule": setup.policies.schedule,
            **beside(setup),
            **stage_plan(simulation),
            "dispatch": setup.policies.dispatch.model_dump(mode="json", exclude_none=True),
            "max_running_requests_per_dp_rank": simulation.model.limits.max_running,
        },
        "run": {
            "seed": simulation.seed,
            "wall_s": simulation.wall_s,
            "cpu_s": simulation.cpu_s,
            "steps": served.steps,
            "events": served.events,
            "draws": len(simulation.drawn),
            "draws_outside_profile": simulation.draws_outside,
            "fidelity": simulation.fidelity,
        },
    }


def beside(setup: LayerSetup) -> dict[str, Any]:
    """What a plan's storage and the overlap of its streams rest on; nothing where both are plain."""
    found: dict[str, Any] = {}
    if setup.storage is not None:
        found["storage"] = {"kind": setup.storage.kind, "expert_bytes": setup.storage.expert_bytes}
        hits = setup.storage.hits
        if hits is not None:
            rates = [float(rate) for rate in hits.hits.mean(axis=(1, 2))]
            found["storage"]["hit_rate"] = [
                {"tokens": float(tokens), "mean": rate} for tokens, rate in zip(hits.tokens, rates, strict=True)
            ]
    if setup.overlap is not None:
        found["overlap"] = {
            mode: {
                "compute": one.compute,
                "communication": one.communication,
                "multiprocessors": one.multiprocessors,
                "tag": one.tag.label,
                "source": one.source,
            }
            for mode, one in setup.overlap.by_mode.items()
        }
    return found


def stage_plan(simulation: Simulation) -> dict[str, Any]:
    """How a plan's pipeline stages run; nothing where there is one."""
    flow, stages = flow_of(simulation.deployment, simulation.model.limits), simulation.deployment.setup.stages
    if flow is None or stages is None:
        return {}
    running = flow.running or simulation.model.limits.max_running
    return {
        "pipeline": {
            "layers": [len(held) for held in stages.layers],
            "batches": flow.batches,
            "running_requests_per_dp_rank": running,
        }
    }


def _memory(simulation: Simulation) -> dict[str, Any]:
    counted = simulation.deployment.memory
    used = simulation.served.peak_kv_tokens * counted.kv_bytes_per_token
    fixed = sum(size for name, size in counted.items.items() if name != "kv_cache")
    return {
        "peak_bytes": fixed + used,
        "limit_bytes": counted.limit_bytes,
        "kv_capacity_tokens_per_dp_rank": counted.kv_capacity_tokens,
        "ledger": {name: float(size) for name, size in counted.items.items()},
        **counted.by_stage(),
    }


def generated(scenario: Scenario) -> str | None:
    """The kind of generator that the routing comes from; None where it was recorded."""
    return None if scenario.routing.synthetic is None else scenario.routing.synthetic.kind


def provenance(simulation: Simulation) -> dict[str, float]:
    """Tag -> share of the simulated step time."""
    found: dict[str, float] = {}
    for (_, tag), share in cost_shares(simulation).items():
        found[tag] = found.get(tag, 0.0) + share
    return dict(sorted(found.items()))


def outside_share(simulation: Simulation) -> float:
    """Share of the step time for which a store was asked beyond what it holds: extrapolated points, and operations by
    formula that a store has tables for (no row of them fits the engine or the shape). A cost model that measures
    nothing has no outside.
    """
    store = simulation.deployment.scenario.cost.source == "store"
    outside = [
        share
        for (family, tag), share in cost_shares(simulation).items()
        if tag == Tag.EXTRAPOLATED.label or (store and tag == Tag.FORMULA.label and family in _MEASURED_WHOLE)
    ]
    return float(sum(outside))


def cost_shares(simulation: Simulation) -> dict[tuple[str, str], float]:
    """(Cost family, tag) -> share of the simulated step time, over both roles where there are roles."""
    side = simulation.served.prefill
    if side is None:
        return _pool_cost_shares(simulation)
    assert simulation.deployment.prefill is not None
    assert simulation.prefill_model is not None
    reading = replace(
        simulation, deployment=simulation.deployment.prefill, model=simulation.prefill_model, served=side.served
    )
    found: dict[tuple[str, str], float] = {}
    whole = float(side.served.step_s.sum() + simulation.served.step_s.sum())
    for one in (reading, replace(simulation, served=replace(simulation.served, prefill=None))):
        if one.served.steps == 0:
            continue
        for key, share in _pool_cost_shares(one).items():
            found[key] = found.get(key, 0.0) + share * float(one.served.step_s.sum()) / whole
    return found


def _pool_cost_shares(simulation: Simulation) -> dict[tuple[str, str], float]:
    """Cost shares of one pool's steps, at the grid points nearest to the run's mean steps."""
    setup, served = simulation.deployment.setup, simulation.served
    reading = served.step_prefill_tokens > 0
    ranks = setup.parallel.attention_dp
    total: dict[tuple[str, str], float] = {}
    for kind, chosen in (("decode", ~reading), ("prefill", reading)):
        weight = float(served.step_s[chosen].sum())
        if weight == 0.0:
            continue
        grid = simulation.model.grid(kind)
        tokens = (served.step_decode_seqs * (1 + simulation.model.drafts) + served.step_prefill_tokens)[chosen]
        mean = max(weighted_mean(tokens, served.step_s[chosen]) / ranks, 1.0)
        longest = min(float(simulation.load.isl.mean()), simulation.model.limits.max_tokens)
        near = grid.steps_near(mean, longest / mean if kind == "prefill" else 1.0)
        kernels = _attention(simulation, kind, mean, longest)
        seconds = step_seconds(setup, replace(grid.priced, attention=kernels), near)
        whole = sum(seconds.values())
        for key, value in seconds.items():
            total[key] = total.get(key, 0.0) + value / whole * weight
    everything = sum(total.values())
    return {key: value / everything for key, value in total.items()}


def _attention(simulation: Simulation, kind: str, mean_tokens: float, prompt: float) -> Part:
    """The attention of a mean step, which the grid leaves out: of a prompt, or of half-grown contexts."""
    if kind == "prefill":
        return simulation.model.prefill_attention(1, prompt, 0.0)
    load = simulation.load
    context = float(load.isl.mean() + load.osl.mean() / 2)
    batch = step_batch(ranks=1, decode_seqs=mean_tokens, decode_kv=context)
    two_batch = simulation.deployment.setup.policies.schedule == "two_batch"
    return simulation.model.pricer.attending(batch.half() if two_batch else batch)


def slo_report(metrics: dict[str, Any], limits: dict[tuple[str, str], float]) -> dict[str, Any]:
    """Each service level with what was found, and whether all are met."""
    rows = []
    for (name, statistic), limit in limits.items():
        value = float(metrics[name][statistic])
        rows.append({"metric": f"{name}.{statistic}", "limit_s": limit, "value_s": value, "met": value <= limit})
    return {"met": all(row["met"] for row in rows), "limits": rows}
