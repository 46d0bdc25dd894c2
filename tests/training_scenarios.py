"""Small training scenarios that tests share."""

from __future__ import annotations

from typing import Any

from moesim.spec.scenario import Scenario


def training(**changes: Any) -> dict[str, Any]:
    """OLMoE on two nodes of 8 GPUs in 2 stages, priced by formula: runs in hundredths of a second."""
    data: dict[str, Any] = {
        "schema_version": 1,
        "model": "allenai/OLMoE-1B-7B-0924",
        "cluster": {"system": "h200_sxm", "nodes": 2, "gpus_per_node": 8},
        "precision": {"dense": "bf16", "experts": "bf16", "dispatch": "bf16", "combine": "bf16"},
        "cost": {"source": "roofline"},
        "routing": {"synthetic": {"kind": "lognormal", "sigma": 0.7, "workloads": 4}},
        "parallel": {"tp": 2, "pp": 2, "attention_dp": 2, "ep": 4},
        "policies": {"dispatch": {"backend": "alltoall"}},
        "training": {"sequence_length": 1024, "micro_batch": 1, "global_batch": 32},
    }
    data.update(changes)
    return data


def asked(**changes: Any) -> Scenario:
    """The same, read; keys of `training` that are given replace its own."""
    own = changes.pop("training", {})
    data = training(**changes)
    return Scenario.model_validate({**data, "training": {**data["training"], **own}})
