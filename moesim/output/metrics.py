"""The contract's figures of a simulation, as one JSON-ready mapping."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import Estimate, Tag
from moesim.engine import maxplus
from moesim.engine.draws import LEVEL, interval
from moesim.engine.serving import Served
from moesim.engine.simulate import Simulation, typical_decode
from moesim.engine.stepmodel import ExactModel
from moesim.graph.pricing import LayerSetup, Part, PricedStep
from moesim.routing.trace import stack_profiles
from moesim.spec.plan import max_over_mean

SCHEMA_VERSION = 1
STATISTICS = ("mean", "p50", "p90", "p99")


def latency(values: NDArray[np.float64]) -> dict[str, float]:
    """Mean and percentiles of latencies in seconds; zeros where there are none (one-token outputs have no gaps)."""
    if values.size == 0:
        return dict.fromkeys(STATISTICS, 0.0)
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {"mean": float(values.mean()), "p50": float(p50), "p90": float(p90), "p99": float(p99)}


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
    return {
        "requests_completed": int(done.sum()),
        "duration_s": seconds,
        **rates,
        **{f"{name}_per_gpu": value / gpus for name, value in rates.items()},
        "ttft_s": latency((served.first_token_s - served.arrival_s)[done]),
        "tpot_s": latency(tpot),
        "itl_s": latency(served.gaps_s),
        "e2e_s": latency((served.finish_s - served.arrival_s)[done]),
    }


def flatten(metrics: dict[str, Any]) -> dict[str, float]:
    """Dotted names: `tpot_s.p99`; a latency's bare name is its mean."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
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


def tag_seconds(setup: LayerSetup, priced: PricedStep) -> dict[str, float]:
    """Seconds of a step by provenance tag, mean over ranks and steps, all layers counted."""
    model = setup.model
    times = {
        "projections": model.layers,
        "attention": model.layers,
        "attention_sync": model.layers,
        "eager": model.layers,
        "gate": model.moe_layers,
        "shared": model.moe_layers,
        "gather": model.moe_layers,
        "dense": model.dense_layers,
        "dense_sync": model.dense_layers,
    }
    found: dict[str, float] = {}
    for name, part in vars(priced).items():
        if not isinstance(part, Part):
            continue
        for one in part.estimates:
            layers = times.get(name, 1)
            if name in ("dispatch", "experts", "combine"):
                layers = model.moe_layers
            for tag, seconds in _by_tag(one).items():
                found[tag] = found.get(tag, 0.0) + seconds * layers
    return found


def _by_tag(one: Estimate) -> dict[str, float]:
    tags = np.broadcast_to(one.tags, one.seconds.shape)
    return {Tag(int(tag)).label: float((one.seconds * (tags == tag)).mean()) for tag in np.unique(tags)}


def simulation_json(simulation: Simulation) -> dict[str, Any]:
    """Everything that `simulate --json` prints; all that depends on the machine's clock is under `run`."""
    deployment = simulation.deployment
    setup, cluster = deployment.setup, deployment.ground.cluster
    served = simulation.served
    metrics = serving_metrics(served, cluster.gpus)
    batch = typical_decode(simulation)
    graph, priced = ExactModel(simulation.model, "maxplus").build(batch, "decode")
    times = maxplus.run(graph)
    profiles, weights = stack_profiles(deployment.ground.judge)
    loads = setup.placement.rank_loads(np.tensordot(weights, profiles, axes=1))
    rng = np.random.default_rng([simulation.seed, 7])
    per_step = []
    for load in simulation.model.routing.for_phase("decode"):
        counts = simulation.model.routing.counts(load, np.full(8, batch.tokens.sum()), rng)
        per_step.append(max_over_mean(setup.placement.rank_loads(counts)).mean())
    return {
        "schema_version": SCHEMA_VERSION,
        "metrics": metrics,
        "intervals": intervals([serving_metrics(one, cluster.gpus) for one in simulation.drawn]),
        "step": {
            "tokens_per_dp_rank": float(batch.tokens.mean()),
            "step_s": float(times.step_s.mean()),
            "by_operation_s": {name: float(value.mean()) for name, value in sorted(times.busy_s.items())},
            "exposed_communication_s": float(times.exposed_communication_s().mean()),
            "by_rank_s": [float(value) for value in times.compute_busy_s.mean(axis=0)],
        },
        "routing": {
            "max_over_mean": float(max_over_mean(loads).mean()),
            "per_step_max_over_mean": float(np.mean(per_step)),
            "dropped_fraction": 0.0,
            "dispersion": simulation.model.routing.dispersion.tag,
            "judged_on": [load.name for load in deployment.ground.judge],
            "judged_on_fit": deployment.ground.judged_on_fit,
        },
        "memory": _memory(simulation),
        "slo": slo_report(metrics, deployment.scenario.objective.slo.limits()),
        "provenance": provenance(simulation, priced),
        "plan": {
            "parallel": setup.parallel.model_dump(mode="json"),
            "instances": deployment.instances,
            "solver": setup.placement.solver,
            "redundant_experts": setup.placement.redundant,
            "schedule": setup.policies.schedule,
            "dispatch": setup.policies.dispatch.model_dump(mode="json"),
            "max_running_requests_per_dp_rank": simulation.model.limits.max_running,
        },
        "run": {
            "seed": simulation.seed,
            "wall_s": simulation.wall_s,
            "cpu_s": simulation.cpu_s,
            "steps": served.steps,
            "events": served.events,
            "draws": len(simulation.drawn),
            "fidelity": simulation.fidelity,
        },
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
    }


def provenance(simulation: Simulation, decode: list[PricedStep]) -> dict[str, float]:
    """Tag -> share of the simulated step time: a typical decode step, and the grid of prompt-reading steps."""
    setup, served = simulation.deployment.setup, simulation.served
    reading = served.step_prefill_tokens > 0
    total: dict[str, float] = {}
    kinds = [(tag_seconds(setup, decode[0]), float(served.step_s[~reading].sum()))]
    if reading.any():
        kinds.append((tag_seconds(setup, simulation.model.grid("prefill").priced), float(served.step_s[reading].sum())))
    for seconds, weight in kinds:
        whole = sum(seconds.values())
        for tag, value in seconds.items():
            total[tag] = total.get(tag, 0.0) + value / whole * weight
    everything = sum(total.values())
    return {tag: value / everything for tag, value in sorted(total.items())}


def slo_report(metrics: dict[str, Any], limits: dict[tuple[str, str], float]) -> dict[str, Any]:
    """Each service level with what was found, and whether all are met."""
    rows = []
    for (name, statistic), limit in limits.items():
        value = float(metrics[name][statistic])
        rows.append({"metric": f"{name}.{statistic}", "limit_s": limit, "value_s": value, "met": value <= limit})
    return {"met": all(row["met"] for row in rows), "limits": rows}
