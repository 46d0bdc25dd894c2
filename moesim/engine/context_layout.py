"""Split contexts of a serving plan (`parallel.decode_cp`): whether it can have them, by its engine's rules.

docs/explanation/serving.md says how engines run them, with sources.
"""

from __future__ import annotations

from moesim.engine.speculative import draft_tokens
from moesim.errors import BadInput, Infeasible
from moesim.graph.decode_context import BY_ALL_TO_ALL, BY_REDUCE_SCATTER
from moesim.spec.cluster import ClusterSpec
from moesim.spec.model import ModelSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import Scenario

WHERE = "parallel.decode_cp"
REASON = "with_decode_cp"
# SGLang documents it for MLA's latent cache; it refuses drafts with it by attention backend (pull request 33926).
MLA_ALONE = ("sglang",)
# Nothing of another micro-batch or of the experts runs beside a layer's attention in these.
SCHEDULES = ("sequential", "whole_graph", "pipeline", "shared_overlap")


def check_decode_cp(scenario: Scenario, parallel: ParallelSpec, model: ModelSpec, cluster: ClusterSpec) -> None:
    """Whether the contexts of a serving plan can be split. Raises Infeasible (its reason is counted)."""
    parts = parallel.decode_cp
    if parts == 1:
        return
    engine = scenario.engine.name
    if engine not in BY_REDUCE_SCATTER + BY_ALL_TO_ALL:
        raise Infeasible(
            f"{engine} splits contexts over GPUs of their own (Helix), which is not simulated",
            where=WHERE,
            mend="set it to 1, or use engine vllm or sglang",
            reason=REASON,
        )
    check_heads(parallel, model, engine)
    node = cluster.gpus_per_node
    if node % parts if parts < node else parts % node:
        raise Infeasible(
            f"{parts} GPUs that share a context neither divide a node of {node} nor fill several",
            where=WHERE,
            mend=f"choose a divisor of {node}",
            reason="nodes_not_filled",
        )
    for asked, what, where in _not_simulated(scenario, model):
        if asked:
            raise Infeasible(
                f"{what} with split contexts is not simulated", where=where, mend=f"set {WHERE} to 1", reason=REASON
            )


def check_heads(parallel: ParallelSpec, model: ModelSpec, engine: str) -> None:
    """Whether a TP group holds copies to split, by vLLM's rules for grouped-query attention. Raises Infeasible.

    Its `verify_with_parallel_config` (vllm/config/model.py) asks for tp above the KV heads.
    """
    spec, parts = model.attention, parallel.decode_cp
    if spec.kind == "mla":
        return
    if engine in MLA_ALONE:
        raise Infeasible(
            f"{engine} splits the contexts of latent attention only, not of {model.id}",
            where=WHERE,
            mend="set it to 1, or use engine vllm",
            reason=REASON,
        )
    copies = spec.copies(parallel.tp)
    if copies % parts:  # neighbours beyond one KV head's copies would share nothing
        raise Infeasible(
            f"tp {parallel.tp} keeps each of {spec.kv_heads} KV heads {copies} times: {parts} GPUs hold no "
            "copies of one context to split",
            where=WHERE,
            mend=f"use a divisor of {copies}" if copies > 1 else f"set it to 1, or tp above {spec.kv_heads}",
            reason="nothing_to_split",
        )
    if spec.heads // spec.kv_heads % parts:
        raise Infeasible(
            f"{spec.heads // spec.kv_heads} query heads of a KV head do not divide by {parts}",
            where=WHERE,
            mend="choose a divisor of them",
            reason="heads_not_divisible",
        )


def _not_simulated(scenario: Scenario, model: ModelSpec) -> list[tuple[bool, str, str]]:
    """(Whether asked for, what, where) of all that leaves no room for split contexts yet."""
    serving, engine = scenario.serving, scenario.engine.name
    drafts = serving is not None and draft_tokens(serving) > 0 and engine in MLA_ALONE
    schedule = scenario.policies.schedule
    return [
        (schedule not in SCHEDULES, f"schedule {schedule}", "policies.schedule"),
        (model.attention.index_top_k > 0, "sparse attention", WHERE),
        (model.attention.window > 0, "a sliding window", WHERE),
        (drafts, f"speculative decoding of {engine}", "serving.speculative"),
    ]


def refuse_in_prefill(parallel: ParallelSpec | None) -> None:
    """A pool that decodes nothing gains nothing from it, and what it would send to others is not simulated."""
    if parallel is not None and parallel.decode_cp > 1:
        raise BadInput(
            "a prefill pool decodes nothing, so it has no contexts to split",
            where=f"serving.roles.prefill.{WHERE}",
            mend="leave it out there, the decode role may have it",
        )
