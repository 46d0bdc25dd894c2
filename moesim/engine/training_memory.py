"""What one GPU holds in training: weights, gradients, optimizer states, saved activations, buffers; by pipeline stage.

Saved activations are counted tensor by tensor as V. Korthikanti et al. do (arXiv:2205.05198, section 4: s b h (34 +
5 a s / h) bytes for a layer of GPT), for what a layer is here: RMSNorm, grouped-query or latent attention by a fused
kernel (no scores are kept, so their term 5 a s / h is gone), SwiGLU, no dropout, experts. Sequence parallelism divides
by TP what lies between attention and feed-forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.engine.deepep_memory import deepep_buffer_bytes
from moesim.engine.memory import (
    ALLOCATOR_SLACK,
    NCCL_GROUP_BYTES,
    NCCL_PAIR_BYTES,
    RUNTIME_BYTES,
    attention_parameters,
)
from moesim.errors import Infeasible
from moesim.graph.pipeline import PipelineProgram
from moesim.graph.training_layer import TrainingSetup
from moesim.network.rank_groups import Group
from moesim.spec.model import ModelSpec
from moesim.spec.parallel import ParallelSpec
from moesim.units import BYTES_PER_ELEMENT, human_bytes

Floats = NDArray[np.float64]

# Adam in mixed precision keeps a float32 copy of each weight and two moments (S. Rajbhandari et al., ZeRO,
# arXiv:1910.02054, section 3.1: K = 12 bytes).
OPTIMIZER_BYTES = 12.0
# Where the weights are float32 themselves, the two moments are all there is.
MOMENTS_BYTES = 8.0
# FP8 products read a copy of each weight and, on Hopper, a transposed one (Transformer Engine: FP8 products take only
# one layout); the bf16 weight stays. Assumed: both are kept between micro-batches.
FP8_COPIES = 2
# Quantile, over drawn micro-batches, of the rows of the stage's hottest rank, at which its activations are counted.
HOT_QUANTILE = 0.99
_GROUPS: tuple[Group, ...] = ("tp", "cp", "dp_cp", "pp", "ep", "expert_tp", "expert_dp")

ASSUMED = {
    "runtime": f"{human_bytes(RUNTIME_BYTES)} for driver, CUDA context and libraries, from two public start-up logs",
    "nccl_buffers": "one communicator for each parallel group in use, sized as aiconfigurator-core observed",
    "working_set": f"live tensors of one layer and the loss x {ALLOCATOR_SLACK} (allocator)",
    "weights_fp8_copies": "a copy of each FP8 weight and a transposed one, kept between micro-batches",
}


def optimizer_bytes(activations: str) -> float:
    """Bytes that Adam keeps for each weight of a model in some type, the weight itself not counted."""
    return MOMENTS_BYTES if activations == "fp32" else OPTIMIZER_BYTES


@dataclass(frozen=True)
class TrainingLedger:
    """Bytes on the fullest GPU of each pipeline stage by purpose: stages[stage][item]; assumed: item -> why."""

    stages: tuple[dict[str, float], ...]
    limit_bytes: float
    assumed: dict[str, str]

    @property
    def fullest(self) -> int:
        """The stage that needs most."""
        return int(np.argmax([sum(items.values()) for items in self.stages]))

    @property
    def peak_bytes(self) -> float:
        """Bytes of the fullest GPU."""
        return float(sum(self.stages[self.fullest].values()))


def dense_parameters(model: ModelSpec, parallel: ParallelSpec, layers: range) -> dict[str, float]:
    """Weights of one rank outside the routed experts, for the layers of a chunk, by ledger item.

    Divided by TP but for latent attention's down-projections, an indexer and the gates, which every TP rank holds
    whole. The first chunk has the embedding, the last one the head (tied: a copy, where another stage embeds).
    """
    whole, divided = attention_parameters(model)
    moe = sum(layer in model.moe.layer_ids for layer in layers)
    first, last = layers.start == 0, layers.stop == model.layers
    table = model.vocabulary * model.hidden / parallel.tp
    tables = int(first) + int(last and not (model.tied_embeddings and parallel.pp == 1))
    return {
        "weights_embeddings": table * tables,
        "weights_attention": (whole + divided / parallel.tp) * len(layers),
        "weights_dense": 3 * model.hidden * model.dense_intermediate / parallel.tp * (len(layers) - moe),
        "weights_gates": float(model.hidden * model.moe.experts * moe),
        "weights_shared": 3 * model.hidden * model.moe.shared_intermediate / parallel.tp * moe,
    }


def expert_parameters(model: ModelSpec, parallel: ParallelSpec, layers: range) -> float:
    """Weights of the routed experts of one rank, for the layers of a chunk."""
    moe = sum(layer in model.moe.layer_ids for layer in layers)
    return model.moe.experts / parallel.ep * model.expert_parameters() / parallel.expert_tp * moe


def stage_parameters(setup: TrainingSetup, chunks: tuple[range, ...], stage: int) -> tuple[dict[str, float], float]:
    """Weights of one rank of a stage: outside the experts by item, and of the experts."""
    dense: dict[str, float] = {}
    experts = 0.0
    for chunk in chunks[stage :: setup.parallel.pp]:
        for name, count in dense_parameters(setup.model, setup.parallel, chunk).items():
            dense[name] = dense.get(name, 0.0) + count
        experts += expert_parameters(setup.model, setup.parallel, chunk)
    return dense, experts


def count_memory(
    setup: TrainingSetup, chunks: tuple[range, ...], program: PipelineProgram, rows: Floats
) -> TrainingLedger:
    """The memory of every stage's fullest GPU.

    rows: [micro-batches, MoE layers, EP ranks], token rows of each rank's experts over drawn micro-batches.
    """
    stages = tuple(_stage(setup, chunks, program, rows, stage) for stage in range(setup.parallel.pp))
    memory = setup.training.memory
    limit = setup.cluster.gpu.hbm_bytes * memory.fraction - memory.reserved_bytes
    names = set().union(*stages)
    return TrainingLedger(stages, limit, {name: text for name, text in ASSUMED.items() if name in names})


def require_room(setup: TrainingSetup, counted: TrainingLedger) -> None:
    """Raises Infeasible (reason `out_of_memory`) with the largest items where the fullest GPU has no room."""
    limit = counted.limit_bytes
    if counted.peak_bytes > limit:
        items = counted.stages[counted.fullest]
        largest = sorted(items, key=lambda name: -items[name])[:3]
        raise Infeasible(
            f"pipeline stage {counted.fullest} needs {human_bytes(counted.peak_bytes)} but {setup.cluster.gpu.name} "
            f"may use {human_bytes(limit)} ({', '.join(f'{name} {human_bytes(items[name])}' for name in largest)})",
            where="training",
            mend="use recompute: full, a smaller micro_batch, or more pp, ep or tp",
            reason="out_of_memory",
        )


def _stage(
    setup: TrainingSetup, chunks: tuple[range, ...], program: PipelineProgram, rows: Floats, stage: int
) -> dict[str, float]:
    dense, experts = stage_parameters(setup, chunks, stage)
    optimizer = setup.training.optimizer
    size = BYTES_PER_ELEMENT[setup.precision.activations]
    items = {name: count * size for name, count in dense.items()}
    items["weights_experts"] = experts * size
    plain = sum(dense.values())
    low = BYTES_PER_ELEMENT["fp8"] * FP8_COPIES
    products = plain - dense["weights_embeddings"] - dense["weights_gates"]
    items["weights_fp8_copies"] = low * (
        (products if setup.precision.dense.startswith("fp8") else 0.0)
        + (experts if setup.precision.experts.startswith("fp8") else 0.0)
    )
    gradient = BYTES_PER_ELEMENT[optimizer.gradients]
    items["gradients_dense"], items["gradients_experts"] = plain * gradient, experts * gradient
    shards = setup.grid.gpus("dp_cp") if optimizer.distributed else 1
    expert_shards = setup.grid.gpus("expert_dp") if optimizer.distributed else 1
    states = optimizer_bytes(setup.precision.activations)
    items["optimizer_dense"] = plain * states / shards
    items["optimizer_experts"] = experts * states / expert_shards
    items |= activation_items(setup, chunks, program.held(stage), rows, stage)
    items["communication_buffers"] = _buffers(setup)
    sizes = [setup.grid.gpus(group) for group in _GROUPS]
    items["nccl_buffers"] = float(sum(NCCL_PAIR_BYTES if n == 2 else NCCL_GROUP_BYTES for n in sizes if n > 1))
    items["runtime"] = RUNTIME_BYTES
    return {name: float(value) for name, value in items.items() if value > 0}


def activation_items(
    setup: TrainingSetup, chunks: tuple[range, ...], held: NDArray[np.int64], rows: Floats, stage: int
) -> dict[str, float]:
    """Saved activations of a stage's fullest rank, and what is live beside them.

    held: micro-batches in flight of each of the stage's chunks. The experts' share is the hottest rank's at
    HOT_QUANTILE over micro-batches, as if it stayed the hottest in all that are in flight.
    """
    model = setup.model
    full = setup.training.recompute == "full"
    mine = chunks[stage :: setup.parallel.pp]
    index = {layer: row for row, layer in enumerate(model.moe.layer_ids)}
    in_flight = np.zeros(model.moe_layers)
    saved = 0.0
    for chunk, count in zip(mine, held, strict=True):
        for layer in chunk:
            saved += float(count) * (input_bytes(setup) if full else layer_bytes(setup, layer))
            if layer in index:
                in_flight[index[layer]] = float(count)
    hottest = np.einsum("l,plr->pr", in_flight, rows).max(axis=1)
    experts = 0.0 if full else float(np.quantile(hottest, HOT_QUANTILE)) * expert_row_bytes(setup)
    layers = [layer for chunk in mine for layer in chunk]
    working = 0.0
    if full or "moe" in _again(setup):  # one layer at a time comes to life again
        widest = float(np.quantile(rows.max(axis=(1, 2)), HOT_QUANTILE)) * expert_row_bytes(setup, keep_all=True)
        live = [(layer_bytes(setup, layer) if full else 0.0) + (widest if layer in index else 0.0) for layer in layers]
        working = max(live)
    if model.layers - 1 in layers:  # logits in the activations' type and their softmax in float32
        columns = -(-model.vocabulary // setup.parallel.tp)
        size = BYTES_PER_ELEMENT[setup.precision.activations] + BYTES_PER_ELEMENT["fp32"]
        working = max(working, setup.rows * columns * size)
    return {
        "activations": saved,
        "activations_experts": experts,
        "working_set": ALLOCATOR_SLACK * working,
    }


def input_bytes(setup: TrainingSetup) -> float:
    """The input of a layer on one rank: all that full recomputation keeps."""
    return setup.local_rows * setup.model.hidden * BYTES_PER_ELEMENT[setup.precision.activations]


def layer_bytes(setup: TrainingSetup, layer: int) -> float:
    """Saved by one layer of one micro-batch on one rank, its experts' rows left out."""
    return attention_bytes(setup) + feed_forward_bytes(setup, moe=layer in setup.model.moe.layer_ids)


def _again(setup: TrainingSetup) -> frozenset[str]:
    training = setup.training
    return frozenset(training.recompute_modules) if training.recompute == "selective" else frozenset()


def attention_bytes(setup: TrainingSetup) -> float:
    """Input, normalised input, queries, keys and values, the kernel's output and its log-sum-exp.

    `layernorm` drops the second, `core_attn` the last two. Under context parallelism the gathered keys and values stay.
    """
    model, tp = setup.model, setup.parallel.tp
    spec, size = model.attention, BYTES_PER_ELEMENT[setup.precision.activations]
    again = _again(setup)
    heads = max(1, spec.heads // tp)
    kv_heads = heads if spec.kind == "mla" else max(1, spec.kv_heads // tp)
    per_row = heads * spec.head_dim + setup.parallel.cp * kv_heads * (spec.head_dim + spec.value_head_dim)
    if spec.kind == "mla":  # both latents before and after their norm
        per_row += 2 * (spec.q_lora_rank + spec.kv_lora_rank + spec.qk_rope_head_dim)
    total = input_bytes(setup) * (1 if "layernorm" in again else 2) + setup.rows * per_row * size
    if "core_attn" not in again:
        total += setup.rows * heads * (spec.value_head_dim * size + BYTES_PER_ELEMENT["fp32"])
    return total


def feed_forward_bytes(setup: TrainingSetup, *, moe: bool) -> float:
    """Input, normalised input; gate and up, their product (dense, shared); the gate's logits and probabilities."""
    model, tp = setup.model, setup.parallel.tp
    again, size = _again(setup), BYTES_PER_ELEMENT[setup.precision.activations]
    total = input_bytes(setup) * (1 if "layernorm" in again else 2)
    if not moe:
        return total + (0.0 if "mlp" in again else setup.rows * 3 * model.dense_intermediate / tp * size)
    if "moe" in again:
        return total
    shared = setup.rows * 3 * model.moe.shared_intermediate / tp * size
    return total + shared + setup.local_rows * model.moe.experts * 2 * BYTES_PER_ELEMENT["fp32"]


def expert_row_bytes(setup: TrainingSetup, *, keep_all: bool = False) -> float:
    """Saved for one token row of a rank's experts: its input, gate and up, and (without `moe_act`) their product.

    Probabilities are applied to that product, as Megatron-Core does, so that the output need not be kept.
    """
    again = frozenset() if keep_all else _again(setup)
    if "moe" in again:
        return 0.0
    size = BYTES_PER_ELEMENT[setup.precision.activations]
    width = setup.model.moe.intermediate / setup.parallel.expert_tp
    return size * (setup.model.hidden + width * (2 if "moe_act" in again else 3))


def _buffers(setup: TrainingSetup) -> float:
    if setup.policies.dispatch.backend != "deepep" or setup.parallel.ep == 1:
        return 0.0
    return deepep_buffer_bytes(setup.model.hidden, setup.parallel.ep, setup.placement.slots)
