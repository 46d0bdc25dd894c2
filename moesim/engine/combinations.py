"""Which schedules and storages go together, and with what; everything else is refused by name before it runs."""

from __future__ import annotations

from moesim.engine.rules import engine_rules
from moesim.errors import BadInput, Infeasible
from moesim.graph.plan_pricer import LOW_LATENCY_CHUNKS
from moesim.spec.model import ModelSpec
from moesim.spec.scenario import Scenario

MOST_CHUNKS = 16
# Schedules that hide the exchange behind other work of the same batch.
BESIDE_EXCHANGE = ("pipeline", "shared_overlap", "shortcut")


def check_keys(scenario: Scenario) -> None:
    """Whether the keys of schedule and storage make sense by themselves. Raises BadInput."""
    policies = scenario.policies
    chunks = policies.overlap.chunks
    if chunks != "auto" and policies.schedule != "pipeline":
        raise BadInput(
            f"the schedule {policies.schedule} has no chunks",
            where="policies.overlap.chunks",
            mend="leave it out, or use schedule pipeline",
        )
    if chunks != "auto" and not 2 <= chunks <= MOST_CHUNKS:
        raise BadInput(
            f"a pipeline of {chunks} chunks",
            where="policies.overlap.chunks",
            mend=f"give 2 to {MOST_CHUNKS}, or auto",
        )
    if (policies.expert_cache is not None) != (policies.storage == "cached"):
        mend = "leave it out, or use storage cached" if policies.expert_cache else "say how many experts stay"
        raise BadInput("expert_cache and storage cached go together", where="policies.expert_cache", mend=mend)
    if policies.schedule == "forward_backward" and scenario.serving is not None:
        raise BadInput(
            "forward_backward sets a backward pass beside a forward pass, and serving has none",
            where="policies.schedule",
            mend="use two_batch",
        )


def check_combination(scenario: Scenario, model: ModelSpec) -> None:
    """Whether the schedule and the storage of a plan can run with its other policies and its engine.

    Raises Infeasible (its reason is counted).
    """
    _check_schedule(scenario, model)
    if scenario.serving is not None and scenario.policies.schedule == "whole_graph":
        _check_whole_graph(scenario)
    _check_storage(scenario)


def _check_schedule(scenario: Scenario, model: ModelSpec) -> None:
    policies = scenario.policies
    schedule, dispatch = policies.schedule, policies.dispatch
    where = "policies.schedule"
    if schedule in BESIDE_EXCHANGE and dispatch.backend == "allreduce":
        raise Infeasible(
            f"{schedule} runs beside an exchange of tokens, and allreduce has none",
            where=where,
            mend="use sequential, or another dispatch backend",
            reason="schedule_needs_exchange",
        )
    if schedule == "shared_overlap" and not model.moe.shared_intermediate:
        raise Infeasible(
            f"{model.id} has no shared expert to overlap", where=where, mend="use pipeline", reason="no_shared_expert"
        )
    chunks = policies.overlap.chunks
    low_latency = dispatch.backend == "deepep" and dispatch.mode != "normal"
    if schedule == "pipeline" and low_latency and chunks != "auto" and chunks > LOW_LATENCY_CHUNKS:
        raise Infeasible(
            f"DeepEP's low-latency buffers hold {LOW_LATENCY_CHUNKS} results at a time, not {chunks} chunks",
            where="policies.overlap.chunks",
            mend="use 2 or auto, or dispatch mode normal",
            reason="low_latency_limit",
        )
    if policies.overlap.slowdown == "multiprocessors" and dispatch.backend != "deepep":
        raise Infeasible(
            f"how many multiprocessors {dispatch.backend} takes is not known",
            where="policies.overlap.slowdown",
            mend="give {compute, communication}, or use backend deepep",
            reason="overlap_not_known",
        )


def _check_whole_graph(scenario: Scenario) -> None:
    assert scenario.serving is not None
    where, dispatch = "policies.schedule", scenario.policies.dispatch
    if scenario.serving.batching.cuda_graph_sizes == "none":
        raise Infeasible(
            "whole_graph needs captured sizes, and serving.batching.cuda_graph_sizes is none",
            where=where,
            mend="capture some, or use sequential",
            reason="nothing_captured",
        )
    if dispatch.backend == "deepep" and dispatch.mode == "normal":
        raise Infeasible(
            "DeepEP's normal kernels wait for the host, so no step with them can be captured whole",
            where=where,
            mend="use dispatch mode auto or low_latency, or sequential",
            reason="nothing_captured",
        )
    if not engine_rules(scenario.engine.name).captures_prompts:
        raise Infeasible(
            f"{scenario.engine.name} captures decode steps only, which sequential already has",
            where=where,
            mend="use sequential, or engine vllm or moesim",
            reason="nothing_captured",
        )


def _check_storage(scenario: Scenario) -> None:
    policies = scenario.policies
    storage, where = policies.storage, "policies.storage"
    if storage == "resident":
        return
    if policies.schedule == "two_batch":
        raise Infeasible(
            f"which half of a two-batch step brings the weights is not modelled for storage {storage}",
            where=where,
            mend="use schedule sequential, pipeline, shared_overlap or shortcut",
            reason="storage_with_two_batch",
        )
    if storage == "offload":
        return
    if policies.schedule == "whole_graph":
        raise Infeasible(
            f"storage {storage} lets the host choose what to fetch inside a step, which no captured graph can",
            where=where,
            mend="use storage offload or resident, or schedule sequential",
            reason="nothing_captured",
        )
    if scenario.placement.redundant_experts:
        raise Infeasible(
            f"storage {storage} fetches an expert where it lives, and {scenario.placement.redundant_experts} "
            "replicas would give it several homes",
            where=where,
            mend="use placement.redundant_experts 0",
            reason="storage_with_replicas",
        )
