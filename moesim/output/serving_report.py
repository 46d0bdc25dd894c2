"""What the serving loop did beside making tokens: memory that ran out, prefixes found, requests left out, roles."""

from __future__ import annotations

from typing import Any

from moesim.engine.deployment import Deployment
from moesim.engine.serving import Served
from moesim.engine.simulate import Simulation
from moesim.engine.workload import failed_requests


def serving_report(simulation: Simulation) -> dict[str, Any]:
    """JSON-ready.

    prefix_hit_rate: share of admitted prompt tokens that a prefix cache held; None without a cache.
    tokens_per_decode_step: of a sequence, above 1 with speculation. stage_busy: of each pipeline stage, where there are
    several. roles: each pool's plan and memory; None without.
    """
    served, deployment = simulation.served, simulation.deployment
    serving = deployment.serving
    asked, decoded = served.prefix_asked_tokens, int(served.step_decode_seqs.sum())
    roles = None
    if served.prefill is not None and deployment.prefill is not None:
        roles = {"prefill": _pool(deployment.prefill, served.prefill.served), "decode": _pool(deployment, served)}
    return {
        "admission": serving.memory.admission,
        "balance": serving.balance,
        "preemptions": served.preemptions,
        "recomputed_tokens": served.recomputed_tokens,
        "prefix_hit_rate": served.prefix_found_tokens / asked if asked else None,
        "failed_requests_left_out": failed_requests(serving.workload),
        "tokens_per_decode_step": float(served.gap_n.sum()) / decoded if decoded else None,
        **_stage_busy(served),
        "roles": roles,
    }


def _pool(deployment: Deployment, served: Served) -> dict[str, Any]:
    counted = deployment.memory
    return {
        "gpus": deployment.parallel.gpus * deployment.instances,
        "instances": deployment.instances,
        "parallel": deployment.parallel.model_dump(mode="json"),
        "steps": served.steps,
        "peak_bytes": counted.fixed_bytes + served.peak_kv_tokens * counted.kv_bytes_per_token,
        "limit_bytes": counted.limit_bytes,
        **_stage_busy(served),
    }


def _stage_busy(served: Served) -> dict[str, Any]:
    """Share of the run in which each pipeline stage works, mean over instances; nothing where there is one."""
    if served.stage_busy_s is None:
        return {}
    return {"stage_busy": [float(share) for share in served.stage_busy_s.mean(axis=0) / served.duration_s]}
