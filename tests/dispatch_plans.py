"""A small plan for each dispatch backend: OLMoE on two nodes of four GPUs, priced by formula."""

from __future__ import annotations

from typing import Any

from tests.scenarios import small

# Name -> (tp, attention_dp, expert_tp, backend).
PLANS = {
    "deepep": (1, 8, 1, "deepep"),
    "allreduce": (8, 1, 1, "allreduce"),
    "allgather_reducescatter": (1, 8, 1, "allgather_reducescatter"),
    "alltoall": (1, 8, 1, "alltoall"),
    "two_level": (1, 8, 1, "two_level"),
    "tp_dedup": (2, 4, 1, "tp_dedup"),
    "tp_dedup_split": (2, 4, 2, "tp_dedup"),
}


def plan(name: str, **dispatch: Any) -> dict[str, Any]:
    """The scenario of a plan; dispatch: more keys of `policies.dispatch`."""
    tp, attention_dp, expert_tp, backend = PLANS[name]
    return small(
        cluster={"system": "h200_sxm", "nodes": 2, "gpus_per_node": 4},
        parallel={"tp": tp, "attention_dp": attention_dp, "ep": 8 // expert_tp, "expert_tp": expert_tp},
        policies={"dispatch": {"backend": backend, **dispatch}},
    )
