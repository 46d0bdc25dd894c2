"""What a deployment's batches run by: dispatch modes, captured graphs, limits of DeepEP, and batches side by side."""

from __future__ import annotations

from moesim.engine.batch_state import Limits
from moesim.engine.deployment import Deployment
from moesim.engine.graphs import CapturedGraphs, captured_graphs
from moesim.engine.in_flight import Flow
from moesim.engine.rules import low_latency_tokens
from moesim.engine.speculative import draft_tokens
from moesim.graph.priced_step import LayerSetup


def stage_count(setup: LayerSetup) -> int:
    """Pipeline stages of an instance."""
    return 1 if setup.stages is None else setup.stages.count


def exchange_mode(deployment: Deployment, kind: str) -> str:
    """DeepEP mode of a step: `auto` follows the engine, low-latency for pure decode, normal when any rank reads."""
    mode = deployment.setup.policies.dispatch.mode
    if deployment.setup.policies.dispatch.backend != "deepep":
        return "normal"
    if mode == "auto":
        return "low_latency" if kind == "decode" else "normal"
    return mode


def graphs_of(deployment: Deployment) -> CapturedGraphs:
    """The captured graphs of a deployment's decode steps."""
    found = captured_graphs(
        deployment.serving.batching,
        deployment.setup.policies,
        deployment.rules,
        mode=exchange_mode(deployment, "decode"),
    )
    queries = 1 + draft_tokens(deployment.serving)  # sizes are in sequences, each with its tokens to verify
    return CapturedGraphs(tuple(size * queries for size in found.sizes))


def captures_prompts(deployment: Deployment) -> bool:
    """Whether steps that read prompts run in the captured graphs, too: under `whole_graph`, where the exchange can."""
    setup = deployment.setup
    waits = setup.policies.dispatch.backend == "deepep" and exchange_mode(deployment, "prefill") == "normal"
    return setup.policies.schedule == "whole_graph" and not waits


def low_latency_sequences(deployment: Deployment) -> int | None:
    """Sequences of an attention-DP rank that DeepEP's low-latency dispatch takes at once; None where it is not used."""
    setup = deployment.setup
    if setup.policies.dispatch.backend != "deepep" or exchange_mode(deployment, "decode") != "low_latency":
        return None
    most = low_latency_tokens(setup.policies.dispatch.low_latency_tokens, deployment.rules.name)
    return most * setup.parallel.tp // (1 + draft_tokens(deployment.serving))


def flow_of(deployment: Deployment, limits: Limits) -> Flow | None:
    """How batches follow each other through pipeline stages; None where there is one stage.

    vLLM's max_num_seqs counts the requests of all batches under way, so that one batch may hold them all
    (vllm-project/vllm issues 28270 and 50853). SGLang gives each its share (`pp_max_micro_batch_size`, scheduler.py),
    and so does moesim. TensorRT-LLM's max_batch_size is of one batch, and is exported as that share.
    """
    stages = stage_count(deployment.setup)
    if stages == 1:
        return None
    asked = deployment.serving.pipeline
    batches = asked.batches or stages
    share = None if deployment.rules.name == "vllm" else max(1, limits.max_running // batches)
    running, most = asked.running_requests_per_dp_rank or share, low_latency_sequences(deployment)
    if most is not None and most < (running or limits.max_running):
        running = most
    return Flow(stages, batches, running)
