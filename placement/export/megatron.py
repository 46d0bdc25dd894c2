"""Megatron-LM's launch flags; its experts lie contiguous by rank, so only such a plan can be exported."""

from __future__ import annotations

import numpy as np

from moesim.errors import Infeasible
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import Scenario


def launch(placement: ExpertPlacement, scenario: Scenario | None) -> list[str]:
    """Lines of flags (megatron/training/arguments.py of NVIDIA/Megatron-LM).

    Raises Infeasible for a placement with replicas or another order: rank r of Megatron-LM's expert group holds the
    r-th share of the experts in order (megatron/core/transformer/moe/token_dispatcher.py), and no flag changes that.
    """
    contiguous = np.arange(placement.slots) % placement.experts
    if placement.redundant or (placement.physical_to_logical != contiguous).any():
        raise Infeasible(
            "Megatron-LM holds experts in order and without replicas: it cannot load this placement",
            mend="plan with `placement: {solver: contiguous}`, or export to another engine",
            reason="engine_layout",
        )
    lines = [f"--num-experts {placement.experts}", f"--expert-model-parallel-size {placement.ranks}"]
    if scenario is None:
        return lines
    if scenario.parallel is not None:
        parallel = scenario.parallel
        lines.append(f"--tensor-model-parallel-size {parallel.tp}")
        lines.append(f"--pipeline-model-parallel-size {parallel.pp}")
        lines.append(f"--context-parallel-size {parallel.cp}")
        lines.append(f"--expert-tensor-parallel-size {parallel.expert_tp}")
    backend = scenario.policies.dispatch.backend
    dispatcher = {"deepep": "flex", "allgather_reducescatter": "allgather"}.get(backend, "alltoall")
    lines.append(f"--moe-token-dispatcher-type {dispatcher}")
    if backend == "deepep":
        lines.append("--moe-enable-deepep")
    capacity = scenario.policies.capacity
    if capacity.rule == "megatron" and capacity.factor is not None:
        lines.append(f"--moe-expert-capacity-factor {capacity.factor:g}")
        lines.append(f"--moe-token-drop-policy {'position' if capacity.drop == 'position' else 'probs'}")
        if capacity.pad:
            lines.append("--moe-pad-expert-input-to-capacity")
    if scenario.training is not None:
        training = scenario.training
        lines.append(f"--seq-length {training.sequence_length}")
        lines.append(f"--micro-batch-size {training.micro_batch}")
        lines.append(f"--global-batch-size {training.global_batch}")
        if training.recompute != "none":
            lines.append(f"--recompute-granularity {training.recompute}")
    return lines
