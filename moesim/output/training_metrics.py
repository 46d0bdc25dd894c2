"""The contract's figures of a training run, as one JSON-ready mapping."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import Estimate, Tag
from moesim.engine.training import TrainingRun
from moesim.engine.training_overlap import pair_share
from moesim.graph.training_passes import chunk_estimates, passes_of
from moesim.output.metrics import SCHEMA_VERSION, generated, intervals
from moesim.output.priced import priced_json
from moesim.output.routing_report import flow_figures
from moesim.routing.gates.choice import gate_spec
from moesim.routing.spread import UTILISATION_EDGES
from moesim.spec.plan import max_over_mean

Floats = NDArray[np.float64]
WAITING, BUBBLE = "waiting_for_ranks", "pipeline_bubble"


def training_json(run: TrainingRun) -> dict[str, Any]:
    """Everything that `simulate --json` prints of a training run; what depends on the clock is under `run`."""
    model, setup = run.model, run.model.setup
    metrics = run.rates((run.faulted or run.step).step_s)
    memory, shares = model.memory, training_provenance(run)
    return {
        "schema_version": SCHEMA_VERSION,
        "metrics": metrics,
        "intervals": intervals([run.rates(one.step_s) for one in run.drawn]),
        "step": step_figures(run),
        "routing": routing_figures(run),
        "memory": {
            "peak_bytes": memory.peak_bytes,
            "limit_bytes": memory.limit_bytes,
            "ledger": memory.stages[memory.fullest],
            "fullest_stage": memory.fullest,
            "by_stage": list(memory.stages),
            "assumed": memory.assumed,
        },
        "provenance": shares,
        "priced_by": priced_json(
            model.ground.costs, model.ground.scenario.cost.source, shares.get(Tag.EXTRAPOLATED.label, 0.0)
        ),
        "plan": {
            "parallel": setup.parallel.model_dump(mode="json"),
            "instances": setup.grid.instances,
            "data_parallel": setup.data_parallel,
            "expert_data_parallel": setup.grid.gpus("expert_dp"),
            "micro_batches": setup.micro_batches,
            "pipeline": setup.training.pipeline.model_dump(mode="json"),
            "layers_of_chunks": [len(chunk) for chunk in model.chunks],
            "recompute": setup.training.recompute,
            "solver": setup.placement.solver,
            "dispatch": setup.policies.dispatch.model_dump(mode="json"),
        },
        "run": {
            "seed": run.seed,
            "wall_s": run.wall_s,
            "cpu_s": run.cpu_s,
            "steps": 1,
            "events": len(model.program.kind) * setup.grid.instances,
            "draws": len(run.drawn),
            "fidelity": "maxplus",
        },
    }


def step_figures(run: TrainingRun) -> dict[str, Any]:
    """Where a step's time goes: operations, waits and bubble sum to step_s in the mean over ranks.

    Where passes run as pairs, each operation counts by the share that its pair takes of both alone.
    by_rank_s: computation of each GPU of an instance, stage by stage; exposed communication is the rest of the step but
    for the pipeline's bubble: collectives, waiting for the slowest rank, gradients and parameters.
    """
    model, step = run.model, run.step
    met = np.bincount(step.assigned.ravel(), minlength=model.layers.steps) / len(step.assigned)
    stages = model.setup.parallel.pp
    shares = pair_share(model.layers, model.chunks)
    total: dict[str, float] = {}
    kinds = passes_of(model.program.split)
    by_pass = dict.fromkeys((kind.name.lower() for kind in kinds), 0.0)
    compute = []
    for stage in range(stages):
        busy: Floats = np.zeros(0)
        for chunk, share in zip(run.passes[stage::stages], shares[stage::stages], strict=True):
            paired = met * share
            for kind, times in zip(kinds, chunk, strict=True):
                for name, seconds in times.busy_s.items():
                    _add(total, name, float(paired @ seconds.mean(axis=1)) / stages)
                # A rank waits at a meeting, and at the end of a pass for the last rank to end it.
                waited = times.step_s[:, None] - times.rank_end_s + times.wait_s
                _add(total, WAITING, float(paired @ waited.mean(axis=1)) / stages)
                by_pass[kind.name.lower()] += float(paired @ times.step_s) / stages
                here = met @ times.compute_busy_s
                busy = here if busy.size == 0 else busy + here
        compute.append(busy + step.optimizer_s[stage])
    reduce_s, adam_s, gather_s = (float(x.mean()) for x in (step.reduce_s, step.optimizer_s, step.gather_s))
    ends = {"gradient_reduction": reduce_s, "optimizer": adam_s, "parameter_gather": gather_s}
    for name, exposed_s in ends.items():
        _add(total, name, exposed_s)
    bubble = step.step_s - sum(total.values())
    total[BUBBLE] = max(bubble, 0.0)
    computed = float(np.mean(compute))
    return {
        "step_s": step.step_s,
        "by_operation_s": dict(sorted((name, value) for name, value in total.items() if value > 0)),
        "by_pass_s": by_pass,
        "bubble_share": total[BUBBLE] / step.step_s,
        "exposed_communication_s": step.step_s - computed - total[BUBBLE],
        "by_rank_s": [float(value) for stage in compute for value in stage],
    }


def routing_figures(run: TrainingRun) -> dict[str, Any]:
    """How even the ranks' tokens are: of the mean over drawn micro-batches, and of single ones."""
    model = run.model
    pool = model.pool
    loads = model.setup.placement.rank_loads(pool.counts)
    figures = flow_figures(pool.flow, pool.wanted, pool.routing_weights, dropless=pool.rule.dropless)
    spec = gate_spec(model.setup.policies.gate)
    histogram = figures.pop("utilisation")
    return {
        "max_over_mean": float(max_over_mean(loads.mean(axis=0)).mean()),
        "per_step_max_over_mean": float(max_over_mean(loads).mean()),
        "gate": "model" if spec is None else spec.name,
        "capacity": {
            "rule": pool.rule.rule,
            "drop": None if pool.rule.dropless else pool.rule.drop,
            "tag": figures.pop("tag"),
        },
        **figures,
        "utilisation": {"edges": list(UTILISATION_EDGES), "share": histogram},
        "router": model.setup.training.router,
        "dispersion": model.routing.dispersion.tag,
        "judged_on": [load.name for load in model.ground.judge],
        "judged_on_fit": model.ground.judged_on_fit,
        "generated": generated(model.ground.scenario),
    }


def training_provenance(run: TrainingRun) -> dict[str, float]:
    """Tag -> share of the working time of a step (bubble and waits left out), mean over ranks and drawn routings."""
    model = run.model
    stages, micro = model.setup.parallel.pp, model.setup.micro_batches
    found: dict[str, float] = {}
    for chunk in model.chunks:
        for one, row in chunk_estimates(model.layers, chunk, split=model.program.split):
            _by_tag(found, one, row, micro / stages)
    for sync, reduce_s, gather_s in zip(model.sync, run.step.reduce_s, run.step.gather_s, strict=True):
        for part, exposed in ((sync.reduce, reduce_s), (sync.gather, gather_s), (sync.optimizer, None)):
            whole = float(part.seconds().max())
            share = 1.0 if exposed is None or whole == 0 else float(exposed) / whole
            for one in part.estimates:
                _by_tag(found, one, None, share / stages)
    everything = sum(found.values())
    return {tag: seconds / everything for tag, seconds in sorted(found.items())}


def _by_tag(found: dict[str, float], one: Estimate, row: int | None, times: float) -> None:
    seconds, tags = one.seconds, np.broadcast_to(one.tags, one.seconds.shape)
    if row is not None:
        place = row if seconds.shape[1] > 1 else 0
        seconds, tags = seconds[:, place], tags[:, place]
    for tag in np.unique(tags):
        _add(found, Tag(int(tag)).label, float((seconds * (tags == tag)).mean()) * times)


def _add(found: dict[str, float], name: str, seconds: float) -> None:
    found[name] = found.get(name, 0.0) + seconds
