"""What one GPU holds: weights, replicas, activations, buffers, graphs, and the room left for the KV cache.

Every figure is for the fullest GPU of one serving instance. What rests on an assumption is listed in `ASSUMED`;
docs/explanation/memory.md compares the ledger with what engines report.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesim.engine.context_memory import split_context_bytes
from moesim.engine.deepep_memory import DEEPEP_GROUP, deepep_buffer_bytes
from moesim.engine.expert_memory import relayout_staging, stored_experts
from moesim.engine.memory_limits import limit_bytes
from moesim.errors import Infeasible
from moesim.graph.stages import TENSORS_SENT
from moesim.spec.cluster import ClusterSpec
from moesim.spec.model import ModelSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import PoliciesSpec, PrecisionSpec
from moesim.spec.workload import BatchingSpec, MemorySpec
from moesim.units import BYTES_PER_ELEMENT, GIB, MIB, human_bytes

# Weights in block FP8 have one float32 scale for 128 x 128 elements (arXiv:2412.19437, section 3.3.2), not one for
# 128 as activations have.
WEIGHT_BYTES_PER_ELEMENT: dict[str, float] = {**BYTES_PER_ELEMENT, "fp8_block": 1.0 + 4.0 / 128**2}

# SGLang, environ.py: SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK.
LOW_LATENCY_MAX_TOKENS = 128

# Driver, CUDA context and libraries before the first weight is loaded. A public SGLang start-up log on H200 (issue
# sgl-project/sglang#6017) has 137.5 of 140.4 GiB free at that point, one on B200 175.3 of 179.1 GiB; NCCL is in both.
RUNTIME_BYTES = 2.5 * GIB
# One NCCL communicator: 342 MiB for 2 GPUs, 392 MiB for 4 or 8, observed by aiconfigurator-core 0.12.0
# (systems/*.yaml, misc.nccl_mem).
NCCL_PAIR_BYTES = 342 * MIB
NCCL_GROUP_BYTES = 392 * MIB
# What SGLang sets aside for captured graphs and for the attention backend's metadata (server_args.py, 0.5.x).
GRAPH_BASE_BYTES = 512 * MIB
GRAPH_BYTES_PER_SEQUENCE = 2 * MIB
GRAPH_LARGEST_DEFAULT = 512
# Live activations are counted tensor by tensor for one layer; the allocator holds more than is live.
ALLOCATOR_SLACK = 1.25
# Rows of the hottest rank over the mean, when the caller has no routing to take a quantile from.
HOT_RANK_FACTOR = 2.0
LOGIT_BYTES = 4

ASSUMED: dict[str, str] = {
    "runtime": f"{human_bytes(RUNTIME_BYTES)} for driver, CUDA context and libraries, from two public start-up logs",
    "nccl_buffers": "one communicator for each parallel axis in use, sized as aiconfigurator-core observed",
    "cuda_graphs": "512 MiB and 2 MiB for each sequence of the largest captured batch, SGLang's own reserve",
    "activations": f"live tensors of one layer x {ALLOCATOR_SLACK} (allocator); hottest rank by a given factor",
}


@dataclass(frozen=True)
class StageMemory:
    """Bytes on a GPU of one pipeline stage by purpose, without its KV cache, and the tokens that this would hold."""

    layers: range
    items: dict[str, float]
    kv_bytes_per_token: float
    kv_capacity_tokens: int


@dataclass(frozen=True)
class MemoryLedger:
    """Bytes on the fullest GPU by purpose; with pipeline stages, of the stage whose KV cache holds fewest tokens.

    Engines give every stage as many blocks as the poorest one has room for, so that stage binds.
    items: name -> bytes, `kv_cache` (all that is left) included; they sum to limit_bytes. kv_bytes_per_token: of one
    token on one GPU. kv_capacity_tokens: tokens that the KV cache of one attention-DP rank holds. assumed: item -> what
    its figure rests on, for items that are neither counted nor published. stages: of a plan that has several.
    """

    items: dict[str, float]
    hbm_bytes: float
    limit_bytes: float
    kv_bytes_per_token: float
    kv_capacity_tokens: int
    assumed: dict[str, str]
    stages: tuple[StageMemory, ...] = ()

    @property
    def fixed_bytes(self) -> float:
        """Everything but the KV cache."""
        return sum(size for name, size in self.items.items() if name != "kv_cache")

    @property
    def weight_bytes(self) -> float:
        """All weights, replicas of experts included."""
        return sum(size for name, size in self.items.items() if name.startswith("weights_"))

    def to_dict(self) -> dict[str, object]:
        """The contract's `memory` object but for the peak, ready for `json.dump`."""
        return {
            "limit_bytes": self.limit_bytes,
            "hbm_bytes": self.hbm_bytes,
            "ledger": dict(self.items),
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_capacity_tokens": self.kv_capacity_tokens,
            "assumed": dict(self.assumed),
            **self.by_stage(),
        }

    def by_stage(self) -> dict[str, object]:
        """JSON-ready: what a GPU of each pipeline stage holds beside its KV cache; empty without stages."""
        if not self.stages:
            return {}
        return {
            "stages": [
                {
                    "layers": [one.layers.start, one.layers.stop - 1],
                    "ledger": dict(one.items),
                    "kv_bytes_per_token": one.kv_bytes_per_token,
                    "kv_capacity_tokens": one.kv_capacity_tokens,
                }
                for one in self.stages
            ]
        }


def ledger(
    model: ModelSpec,
    cluster: ClusterSpec,
    parallel: ParallelSpec,
    precision: PrecisionSpec,
    slots_per_rank: int,
    batching: BatchingSpec,
    memory: MemorySpec,
    policies: PoliciesSpec,
    *,
    max_context_tokens: int,
    mtp: bool = False,
    low_latency_max_tokens: int = LOW_LATENCY_MAX_TOKENS,
    hot_rank_factor: float = HOT_RANK_FACTOR,
    rebalance: bool = False,
    stages: tuple[range, ...] | None = None,
) -> MemoryLedger:
    """The memory of the fullest GPU of one instance.

    slots_per_rank: expert slots of each MoE layer on one EP rank, replicas included. max_context_tokens: the longest
    request, input and output. mtp: load the multi-token-prediction layers. low_latency_max_tokens: DeepEP's dispatch
    limit per rank. hot_rank_factor: token rows of the hottest rank over the mean in a prefill chunk. rebalance: keep
    the buffer that a layer's experts arrive in while they are laid out anew (vLLM's `expert_weights_buffer`). stages:
    layers of each pipeline stage.

    Raises Infeasible (reason `out_of_memory`) when weights and buffers exceed the limit or when the KV cache cannot
    hold one request; the message names the largest items and a mend.
    """

    def of_stage(layers: range) -> dict[str, float]:
        items = weights(model, parallel, precision, slots_per_rank, policies, mtp=mtp, layers=layers)
        if rebalance:
            items["relayout_staging"] = relayout_staging(items["weights_experts"], model)
        items |= stored_experts(items["weights_experts"], model, slots_per_rank, policies)
        items["activations"] = activation_bytes(
            model, parallel, precision, batching, policies, hot_rank_factor, last=layers.stop == model.layers
        )
        if layers.start > 0:
            items["stage_inputs"] = stage_input_bytes(model, parallel, precision, batching)
        return items

    shared = _shared_items(model, parallel, precision, slots_per_rank, batching, policies, low_latency_max_tokens)
    found = []
    for layers in stages or (range(model.layers),):
        items = {name: size for name, size in (of_stage(layers) | shared).items() if size > 0}
        per_token = kv_bytes_per_token(model, parallel, precision, mtp=mtp, layers=layers)
        limit = limit_bytes(items, cluster.gpu.hbm_bytes, memory)
        capacity = int(max(0.0, limit - sum(items.values())) / per_token)
        found.append((StageMemory(layers, items, per_token, capacity), limit))
    return _fullest(found, model, cluster, parallel, slots_per_rank, max_context_tokens)


def _fullest(
    found: list[tuple[StageMemory, float]],
    model: ModelSpec,
    cluster: ClusterSpec,
    parallel: ParallelSpec,
    slots_per_rank: int,
    max_context_tokens: int,
) -> MemoryLedger:
    """The ledger of the stage that binds, of (stage, its limit). Raises Infeasible where it does not fit."""
    stage, limit = min(found, key=lambda one: (one[0].kv_capacity_tokens, one[1] - sum(one[0].items.values())))
    items, per_token, capacity = dict(stage.items), stage.kv_bytes_per_token, stage.kv_capacity_tokens
    fixed = sum(items.values())
    if fixed > limit:
        raise Infeasible(
            _shortage(items, fixed, limit, cluster),
            mend=_mend(model, parallel, slots_per_rank, items),
            reason="out_of_memory",
            over=fixed / limit - 1.0,
        )
    items["kv_cache"] = limit - fixed
    if capacity < max_context_tokens:
        raise Infeasible(
            f"the KV cache of an attention-DP rank holds {capacity} tokens, but one request needs {max_context_tokens} "
            f"({human_bytes(items['kv_cache'])} are left of {human_bytes(limit)}; {_largest(items)})",
            mend=_mend(model, parallel, slots_per_rank, items),
            reason="out_of_memory",
            over=(max_context_tokens - capacity) * per_token / limit,
        )
    return MemoryLedger(
        items=items,
        hbm_bytes=cluster.gpu.hbm_bytes,
        limit_bytes=limit,
        kv_bytes_per_token=per_token,
        kv_capacity_tokens=capacity,
        assumed={name: text for name, text in ASSUMED.items() if name in items},
        stages=tuple(one for one, _ in found) if len(found) > 1 else (),
    )


def _shared_items(
    model: ModelSpec,
    parallel: ParallelSpec,
    precision: PrecisionSpec,
    slots_per_rank: int,
    batching: BatchingSpec,
    policies: PoliciesSpec,
    low_latency_max_tokens: int,
) -> dict[str, float]:
    """What a GPU of any stage holds beside weights and activations."""
    items = {}
    deepep = policies.dispatch.backend == "deepep" and parallel.ep > 1
    low_latency = deepep and policies.dispatch.mode in ("auto", "low_latency")
    if deepep:
        items["communication_buffers"] = deepep_buffer_bytes(
            model.hidden,
            parallel.ep,
            slots_per_rank * parallel.ep,
            normal=policies.dispatch.mode in ("auto", "normal"),
            low_latency_tokens=low_latency_max_tokens if low_latency else 0,
        )
    if low_latency:
        rows = slots_per_rank * parallel.ep * low_latency_max_tokens
        items["low_latency_tensors"] = rows * _expert_row_bytes(model, parallel, precision)
    items["nccl_buffers"] = nccl_bytes(parallel)
    items["split_contexts"] = split_context_bytes(model, parallel, precision, batching)
    items["cuda_graphs"] = graph_bytes(batching, low_latency_max_tokens if low_latency else None)
    items["runtime"] = RUNTIME_BYTES
    return items


def weights(
    model: ModelSpec,
    parallel: ParallelSpec,
    precision: PrecisionSpec,
    slots_per_rank: int,
    policies: PoliciesSpec,
    *,
    mtp: bool = False,
    layers: range | None = None,
) -> dict[str, float]:
    """Weight bytes of one GPU by kind; norms and biases are left out (below 0.1 %).

    layers: of a pipeline stage, none = all; the first has the embedding, the last the logits' table.

    Attention and dense layers are divided by TP and repeated over attention DP, all but MLA's down-projections and an
    indexer, which every TP rank holds whole. MLA keeps its up-projection a second time, in the activations' type, for
    absorbed decode. Shared experts are repeated on every rank under DeepEP and divided by TP otherwise.
    """
    dense = WEIGHT_BYTES_PER_ELEMENT[precision.dense]
    plain = BYTES_PER_ELEMENT[precision.activations]
    replicated, sharded = attention_parameters(model)
    attention = (replicated + sharded / parallel.tp) * WEIGHT_BYTES_PER_ELEMENT[precision.projections]
    if model.attention.kind == "mla":
        attention += _absorbed_parameters(model) / parallel.tp * plain
    shared_split = 1 if policies.dispatch.scatters else parallel.tp
    expert = model.expert_parameters() / parallel.expert_tp * WEIGHT_BYTES_PER_ELEMENT[precision.experts]
    shared = 3 * model.hidden * model.moe.shared_intermediate / shared_split * dense
    gate = model.hidden * model.moe.experts * plain
    embedding = model.vocabulary * model.hidden / parallel.tp * plain
    layers = range(model.layers) if layers is None else layers
    first, last = layers.start == 0, layers.stop == model.layers
    copies = 1 if first and last and model.tied_embeddings else int(first) + int(last)
    moe_layers = sum(layer in layers for layer in model.moe.layer_ids)
    dense_layers = len(layers) - moe_layers
    items = {
        "weights_embeddings": copies * embedding,
        "weights_attention": attention * len(layers),
        "weights_dense": 3 * model.hidden * model.dense_intermediate / parallel.tp * dense * dense_layers,
        "weights_gates": gate * moe_layers,
        "weights_shared": shared * moe_layers,
        "weights_experts": slots_per_rank * expert * moe_layers,
    }
    if mtp and model.mtp_layers and last:
        # Each MTP layer is a whole MoE layer and a projection of [2 hidden, hidden] (arXiv:2412.19437, section 2.2).
        layer = attention + gate + shared + slots_per_rank * expert + 2 * model.hidden**2 * dense
        items["weights_mtp"] = model.mtp_layers * layer
    return items


def attention_parameters(model: ModelSpec) -> tuple[int, int]:
    """Weights of one layer's attention: what every TP rank holds whole, and what TP divides."""
    attention = model.attention
    whole = 0
    if attention.kind == "mla":
        whole = model.hidden * (attention.q_lora_rank + attention.kv_lora_rank + attention.qk_rope_head_dim)
        whole += (attention.q_lora_rank * attention.index_heads + model.hidden) * attention.index_head_dim
        whole += model.hidden * attention.index_heads
    return whole, attention.parameters(model.hidden) - whole


def _absorbed_parameters(model: ModelSpec) -> int:
    attention = model.attention
    nope = attention.head_dim - attention.qk_rope_head_dim
    return attention.kv_lora_rank * attention.heads * (nope + attention.value_head_dim)


def kv_bytes_per_token(
    model: ModelSpec,
    parallel: ParallelSpec,
    precision: PrecisionSpec,
    *,
    mtp: bool = False,
    layers: range | None = None,
) -> float:
    """Bytes that one token keeps in the KV cache of one GPU of its attention-DP rank.

    Grouped-query keys are divided by TP up to the number of KV heads; MLA's latent is repeated on every TP rank. GPUs
    that share a context hold its tokens in turn: the bytes are the mean of them. layers: of a pipeline stage, none =
    all.
    """
    split = min(parallel.tp, model.attention.kv_heads) if model.attention.kind == "gqa" else 1
    held = range(model.layers) if layers is None else layers
    count = len(held) + (model.mtp_layers if mtp and held.stop == model.layers else 0)
    whole = model.kv_bytes_per_token(precision.kv_cache) * count / model.layers
    return whole / split / parallel.decode_cp


def activation_bytes(
    model: ModelSpec,
    parallel: ParallelSpec,
    precision: PrecisionSpec,
    batching: BatchingSpec,
    policies: PoliciesSpec,
    hot_rank_factor: float = HOT_RANK_FACTOR,
    *,
    last: bool = True,
) -> float:
    """Activations of the largest batch: the widest point of one layer, and the logits where they are made (`last`).

    A layer is widest in its attention, its dense feed-forward or its experts, never in two of them at once. The experts
    of a rank get tokens x attention DP x top-k / EP rows on average, times `hot_rank_factor` where EP is above 1.
    """
    tokens = batching.max_batch_tokens_per_dp_rank
    size = BYTES_PER_ELEMENT[precision.activations]
    attention = model.attention
    kv_heads = attention.heads if attention.kind == "mla" else attention.kv_heads  # MLA's prefill expands its latent
    attention_width = (
        attention.heads * (attention.head_dim + attention.value_head_dim)
        + kv_heads * (attention.head_dim + attention.value_head_dim)
    ) / parallel.tp
    dense_width = 3 * model.dense_intermediate / parallel.tp
    rows = tokens * parallel.attention_dp * model.moe.top_k / parallel.ep
    if parallel.ep > 1:
        rows *= hot_rank_factor
    experts = rows * _expert_row_bytes(model, parallel, precision)
    if policies.dispatch.backend == "allgather_reducescatter":
        experts += 2 * tokens * parallel.attention_dp * model.hidden * size  # gathered inputs, outputs to be scattered
    stream = 3 * tokens * model.hidden * size  # residual, normalised input, output
    widest = max(tokens * attention_width * size, tokens * dense_width * size, experts)
    logits = batching.max_running_requests_per_dp_rank * model.vocabulary * LOGIT_BYTES if last else 0.0
    return ALLOCATOR_SLACK * (stream + widest + logits)


def stage_input_bytes(
    model: ModelSpec, parallel: ParallelSpec, precision: PrecisionSpec, batching: BatchingSpec
) -> float:
    """What a pipeline stage receives of the largest batch, kept for it (vLLM's `make_empty_intermediate_tensors`)."""
    tokens = batching.max_batch_tokens_per_dp_rank
    return TENSORS_SENT * tokens * model.hidden * BYTES_PER_ELEMENT[precision.activations]


def _expert_row_bytes(model: ModelSpec, parallel: ParallelSpec, precision: PrecisionSpec) -> float:
    """Bytes of one token row in the expert GEMMs: input, gate and up, activation, output."""
    intermediate = model.moe.intermediate / parallel.expert_tp
    plain = BYTES_PER_ELEMENT[precision.activations]
    quantised = min(plain, BYTES_PER_ELEMENT[precision.dispatch] + 4.0 / DEEPEP_GROUP)
    return model.hidden * (quantised + plain) + intermediate * (2 * plain + quantised)


def nccl_bytes(parallel: ParallelSpec) -> float:
    """Buffers of NCCL: one communicator for each parallel axis in use."""
    sizes = (parallel.tp, parallel.cp, parallel.decode_cp, parallel.attention_dp, parallel.pp)
    axes = [size for size in sizes if size > 1]
    return float(sum(NCCL_PAIR_BYTES if size == 2 else NCCL_GROUP_BYTES for size in axes))


def graph_bytes(batching: BatchingSpec, low_latency_max_tokens: int | None = None) -> float:
    """Memory of captured CUDA graphs; low-latency's dispatch limit, where there is one, bounds the largest batch."""
    sizes = batching.cuda_graph_sizes
    if sizes == "none":
        return 0.0
    largest = GRAPH_LARGEST_DEFAULT if sizes == "engine" else max(sizes, default=0)
    largest = min(largest, batching.max_running_requests_per_dp_rank, low_latency_max_tokens or largest)
    return float(GRAPH_BASE_BYTES + GRAPH_BYTES_PER_SEQUENCE * largest)


def _largest(items: dict[str, float]) -> str:
    sizes = sorted(((size, name) for name, size in items.items() if name != "kv_cache"), reverse=True)[:3]
    return ", ".join(f"{name} {human_bytes(size)}" for size, name in sizes)


def _shortage(items: dict[str, float], fixed: float, limit: float, cluster: ClusterSpec) -> str:
    return (
        f"weights and buffers need {human_bytes(fixed)} but {cluster.gpu.name} may use {human_bytes(limit)} "
        f"({_largest(items)})"
    )


def _mend(model: ModelSpec, parallel: ParallelSpec, slots_per_rank: int, items: dict[str, float]) -> str:
    """The step that frees most: fewer replicas, then more expert parallelism, then smaller batches."""
    redundant = slots_per_rank * parallel.ep - model.moe.experts
    steps = []
    if redundant > 0:
        steps.append(f"use fewer than {redundant} redundant experts")
    if items.get("weights_experts", 0.0) >= items.get("activations", 0.0):
        steps.append("spread the experts over more GPUs (a larger ep)")
    else:
        steps.append("lower max_batch_tokens_per_dp_rank")
    if parallel.tp == 1:
        steps.append("or raise tp")
    return ", ".join(steps)
