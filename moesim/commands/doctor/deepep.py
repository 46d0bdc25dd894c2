"""What DeepEP's kernels were compiled for, against a plan.

The limits are those of DeepEP 1.2 and its main branch up to August 2026: csrc/kernels/launch.cuh (SWITCH_HIDDEN,
SWITCH_RANKS, SWITCH_RDMA_RANKS), configs.cuh, internode_ll.cu, csrc/deep_ep.cpp and deep_ep/buffer.py of
deepseek-ai/DeepEP, with its pull requests 329, 403, 458 and 731.
"""

from __future__ import annotations

from collections.abc import Iterator

from moesim.commands.doctor.findings import Finding
from moesim.engine.deepep_memory import DEEPEP_NVLINK_PEERS
from moesim.spec.cluster import ClusterSpec
from moesim.spec.model import ModelSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import Scenario

VERSION = "DeepEP 1.2"
# SWITCH_HIDDEN of the low-latency kernels; 6144 since pull request 329, 3072 since 458 (October 2025).
LOW_LATENCY_HIDDEN = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
# kNumMaxTopK of the low-latency kernels: 11 since pull request 403, 9 in 1.1. The normal kernels give each of a warp's
# 32 lanes one expert.
LOW_LATENCY_TOP_K, LOW_LATENCY_TOP_K_BEFORE = 11, 9
NORMAL_TOP_K = 32
# SWITCH_RANKS within a node, SWITCH_RDMA_RANKS in nodes of 8 ranks.
NORMAL_RANKS = (2, 4, 8)
NORMAL_NODES = (2, 4, 8, 16, 18, 20)
# buffer.py has configurations for 24, 48 and 96 ranks, too, but launch.cuh has no case for them (issue 255); some
# builds add one.
CONFIGURED_NODES = (3, 6, 12)
MAX_LOCAL_EXPERTS = 1024  # NUM_MAX_LOCAL_EXPERTS
# A low-latency block serves fewer than 15 experts, and there are as many blocks as multiprocessors.
MAX_EXPERTS_PER_BLOCK = 14
# NVSHMEM_QP_DEPTH: a queue must hold two entries for each token that a rank may dispatch, and two more.
QUEUE_DEPTH = 1024
VECTOR_BYTES = 16  # sizeof(int4): rows are copied in such pieces
SCALE_GROUP = 128  # elements that share one scale of an fp8 row


def limits(
    scenario: Scenario,
    model: ModelSpec,
    cluster: ClusterSpec,
    parallel: ParallelSpec,
    slots: int,
    low_latency_tokens: int,
) -> list[Finding]:
    """DeepEP's limits for a plan that dispatches with it; nothing for others.

    slots: expert slots of a layer over all ranks; low_latency_tokens: the engine's dispatch limit per rank.
    """
    dispatch = scenario.policies.dispatch
    if dispatch.backend != "deepep" or parallel.ep == 1:
        return []
    found = [*_ranks(parallel, cluster, slots)]
    if dispatch.mode in ("auto", "normal"):
        found += _normal(model, parallel, scenario.precision.dispatch)
    if dispatch.mode in ("auto", "low_latency"):
        found += _low_latency(scenario, model, cluster, slots, low_latency_tokens)
    faults = [finding for finding in found if finding.state != "ok"]
    if faults:
        return faults
    modes = "normal and low-latency" if dispatch.mode == "auto" else dispatch.mode.replace("_", "-")
    local = slots // parallel.ep
    detail = f"{VERSION} has kernels for this plan ({modes}): ep {parallel.ep}, width {model.hidden}, "
    return [Finding("deepep", "ok", f"{detail}top-{model.moe.top_k}, {local} experts a rank")]


def _fault(detail: str, mend: str) -> Finding:
    return Finding("deepep", "fault", f"{VERSION}: {detail}", mend)


def _ranks(parallel: ParallelSpec, cluster: ClusterSpec, slots: int) -> Iterator[Finding]:
    if parallel.ep > DEEPEP_NVLINK_PEERS and parallel.ep % DEEPEP_NVLINK_PEERS:
        yield _fault(f"ep {parallel.ep} is no multiple of its {DEEPEP_NVLINK_PEERS} NVLink peers", "change parallel.ep")
    if parallel.ep > cluster.gpus_per_node and cluster.gpus_per_node != DEEPEP_NVLINK_PEERS:
        yield Finding(
            "deepep",
            "warn",
            f"{VERSION} takes {DEEPEP_NVLINK_PEERS} ranks for a node, but a node here has {cluster.gpus_per_node} GPUs",
            "build it with another NUM_MAX_NVL_PEERS, or use its newer backends",
        )
    if slots % parallel.ep == 0 and slots // parallel.ep > MAX_LOCAL_EXPERTS:
        detail = f"{slots // parallel.ep} experts a rank are more than its {MAX_LOCAL_EXPERTS}"
        yield _fault(detail, "raise parallel.ep")


def _normal(model: ModelSpec, parallel: ParallelSpec, dispatch_dtype: str) -> Iterator[Finding]:
    peers = DEEPEP_NVLINK_PEERS
    if parallel.ep <= peers and parallel.ep not in NORMAL_RANKS:
        yield _fault(f"no normal kernels for ep {parallel.ep} within a node", f"use ep {_or(NORMAL_RANKS)}")
    nodes = parallel.ep // peers
    if parallel.ep > peers and parallel.ep % peers == 0 and nodes not in NORMAL_NODES:
        detail = f"no normal kernels for {nodes} nodes of {peers} ranks"
        mend = f"use ep {_or(tuple(peers * each for each in NORMAL_NODES))}, or add a case to SWITCH_RDMA_RANKS"
        if nodes in CONFIGURED_NODES:
            yield Finding("deepep", "warn", f"{VERSION}: {detail}, though it has a configuration for them", mend)
        else:
            yield _fault(detail, mend)
    if model.moe.top_k > NORMAL_TOP_K:
        yield _fault(f"normal kernels take top-{NORMAL_TOP_K} at most, the model has top-{model.moe.top_k}", _OTHER)
    if 2 * model.hidden % VECTOR_BYTES:
        yield _fault(f"rows of {model.hidden} bf16 are no multiple of {VECTOR_BYTES} bytes", _OTHER)
    elif dispatch_dtype.startswith("fp8") and model.hidden % SCALE_GROUP:
        mend = "set precision.dispatch to bf16"
        yield _fault(f"width {model.hidden} is no multiple of the {SCALE_GROUP} that share an fp8 scale", mend)


_OTHER = "set policies.dispatch.backend to allgather_reducescatter"


def _low_latency(
    scenario: Scenario, model: ModelSpec, cluster: ClusterSpec, slots: int, tokens: int
) -> Iterator[Finding]:
    normal = "set policies.dispatch.mode to normal"
    if model.hidden not in LOW_LATENCY_HIDDEN:
        wider = [width for width in LOW_LATENCY_HIDDEN if width > model.hidden]
        detail = f"no low-latency kernels for width {model.hidden} (compiled: {_or(LOW_LATENCY_HIDDEN)})"
        if scenario.engine.name == "vllm" and wider:  # vllm-project/vllm#27122: gpt-oss's 2880 goes as 3072
            mend = f"the bytes priced are {model.hidden / wider[0]:.0%} of those sent"
            yield Finding("deepep", "warn", f"{VERSION}: {detail}; vLLM pads rows to {wider[0]}", mend)
        else:
            yield _fault(detail, f"{normal}, or add a case to SWITCH_HIDDEN")
    if model.moe.top_k > LOW_LATENCY_TOP_K:
        detail = f"low-latency kernels take top-{LOW_LATENCY_TOP_K} at most, the model has top-{model.moe.top_k}"
        yield _fault(detail, f"{normal}, or raise kNumMaxTopK")
    elif model.moe.top_k > LOW_LATENCY_TOP_K_BEFORE:
        detail = f"top-{model.moe.top_k} needs DeepEP after pull request 403: 1.1 stops at {LOW_LATENCY_TOP_K_BEFORE}"
        yield Finding("deepep", "warn", detail, "update DeepEP")
    most = MAX_EXPERTS_PER_BLOCK * cluster.gpu.multiprocessors
    if slots > most:
        detail = (
            f"{slots} expert slots are more than the {most} that {cluster.gpu.multiprocessors} multiprocessors serve"
        )
        yield _fault(detail, "lower placement.redundant_experts")
    if 2 * (tokens + 1) > QUEUE_DEPTH:
        detail = f"{tokens} tokens a rank need a queue of {2 * (tokens + 1)}, NVSHMEM_QP_DEPTH is {QUEUE_DEPTH}"
        yield Finding("deepep", "warn", detail, "raise NVSHMEM_QP_DEPTH")


def _or(values: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, values[:-1]))} or {values[-1]}"
