"""What has to divide what in a plan, each with the key to change; every check is made, also after one that failed."""

from __future__ import annotations

from collections.abc import Iterator

from moesim.commands.doctor.findings import Finding
from moesim.spec.cluster import ClusterSpec
from moesim.spec.model import ModelSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import PoliciesSpec, PrecisionSpec

# Elements of a weight that share one scale, along either side of a product. fp8_block: arXiv:2412.19437, section 3.3;
# vLLM refuses widths that are no multiple of it (vllm-project/vllm#17569). The others: units.py.
SCALE_BLOCK = {"fp8_block": 128, "mxfp4": 32, "nvfp4": 16, "int4": 32}
# Engines pad vocabularies to multiples of this before they cut them: vLLM, vocab_parallel_embedding.py,
# DEFAULT_VOCAB_PADDING_SIZE; SGLang has the same.
VOCABULARY_BLOCK = 64


def divisibility(
    model: ModelSpec,
    cluster: ClusterSpec,
    parallel: ParallelSpec,
    precision: PrecisionSpec,
    policies: PoliciesSpec,
    redundant_experts: int,
) -> list[Finding]:
    """All checks of divisibility of one plan; what cannot run is a fault."""
    return [
        *_gpus(cluster, parallel),
        *_layers(model, parallel),
        *_heads(model, parallel),
        *_contexts(model, parallel),
        *_experts(model, parallel, redundant_experts),
        *_widths(model, parallel, precision, policies),
        _vocabulary(model, parallel),
    ]


def _divides(check: str, whole: int, by: int, what: str, by_what: str, mend: str) -> Finding:
    if whole % by:
        return Finding(check, "fault", f"{whole} {what} do not divide by {by_what} {by}", mend)
    return Finding(check, "ok", f"{whole} {what} / {by_what} {by} = {whole // by}")


def _gpus(cluster: ClusterSpec, parallel: ParallelSpec) -> Iterator[Finding]:
    yield _divides(
        "divides gpus",
        cluster.gpus,
        parallel.gpus,
        "GPUs of the cluster",
        "an instance of",
        "change parallel.tp or parallel.attention_dp (and ep with them)",
    )
    node = cluster.gpus_per_node
    if parallel.gpus > node and parallel.gpus % node:
        mend = f"change parallel.attention_dp so that an instance is a multiple of {node} GPUs"
        detail = f"an instance of {parallel.gpus} GPUs does not fill whole nodes of {node}"
        yield Finding("divides nodes", "fault", detail, mend)
    stage = parallel.gpus // parallel.pp
    if parallel.pp > 1 and (node % stage if stage < node else stage % node):
        detail = f"a pipeline stage of {stage} GPUs neither divides a node of {node} nor fills several"
        yield Finding("divides nodes", "fault", detail, "change parallel.tp or parallel.attention_dp")
    if parallel.tp > max(node, cluster.domain_gpus):
        yield Finding(
            "divides nodes",
            "warn",
            f"tp {parallel.tp} spans nodes of {node} GPUs: every layer's all-reduce crosses NICs",
            f"set parallel.tp to {max(node, cluster.domain_gpus)} at most",
        )


def _layers(model: ModelSpec, parallel: ParallelSpec) -> Iterator[Finding]:
    if parallel.pp == 1:
        return
    if parallel.pp > model.layers:
        told = f"{model.layers} layers cannot fill {parallel.pp} stages"
        yield Finding("divides layers", "fault", told, f"set parallel.pp to {model.layers} at most")
        return
    least, more = divmod(model.layers, parallel.pp)
    each = f"{least}" if not more else f"{least} or {least + 1}"
    yield Finding("divides layers", "ok", f"{model.layers} layers on {parallel.pp} stages: {each} on each")


def _heads(model: ModelSpec, parallel: ParallelSpec) -> Iterator[Finding]:
    yield _divides("divides heads", model.attention.heads, parallel.tp, "attention heads", "tp", "change parallel.tp")
    kv_heads = model.attention.kv_heads
    if model.attention.kind == "gqa" and kv_heads % parallel.tp:
        if parallel.tp % kv_heads:
            detail = f"{kv_heads} KV heads neither divide by tp {parallel.tp} nor divide it"
            yield Finding("divides heads", "fault", detail, "change parallel.tp")
        elif parallel.decode_cp == 1:
            detail = f"{kv_heads} KV heads at tp {parallel.tp}: each is kept {parallel.tp // kv_heads} times"
            mend = f"parallel.tp up to {kv_heads} keeps the cache single, parallel.decode_cp splits the copies"
            yield Finding("divides heads", "warn", detail, mend)


def _contexts(model: ModelSpec, parallel: ParallelSpec) -> Iterator[Finding]:
    if parallel.decode_cp == 1:
        return
    copies = model.attention.copies(parallel.tp)
    check, told = "divides contexts", f"tp {parallel.tp} keeps a context {copies} times"
    if copies % parallel.decode_cp:
        mend = "change parallel.decode_cp, or raise parallel.tp"
        yield Finding(check, "fault", f"{told}, decode_cp {parallel.decode_cp} does not divide that", mend)
    else:
        left = f"decode_cp {parallel.decode_cp} leaves {copies / parallel.decode_cp:g}"
        yield Finding(check, "ok", f"{told}, {left}")


def _experts(model: ModelSpec, parallel: ParallelSpec, redundant: int) -> Iterator[Finding]:
    slots = model.moe.experts + redundant
    more = -(-slots // parallel.ep) * parallel.ep - model.moe.experts
    yield _divides(
        "divides slots", slots, parallel.ep, "expert slots", "ep", f"set placement.redundant_experts to {more}"
    )
    if parallel.ep > model.moe.experts:
        detail = f"ep {parallel.ep} is more than the {model.moe.experts} experts"
        yield Finding("divides slots", "fault", detail, "lower parallel.ep")
    if redundant > model.moe.experts * (parallel.ep - 1):
        detail = f"{redundant} redundant experts are more than one replica of each expert on each rank"
        yield Finding("divides slots", "fault", detail, "lower placement.redundant_experts")


def _widths(
    model: ModelSpec, parallel: ParallelSpec, precision: PrecisionSpec, policies: PoliciesSpec
) -> Iterator[Finding]:
    """Widths that tensor parallelism cuts, and the blocks of their scales."""
    moe, attention = model.moe, model.attention
    # DeepEP keeps shared experts whole on every rank.
    shared_split = 1 if policies.dispatch.scatters else parallel.tp
    values = attention.heads * attention.value_head_dim
    yield from _cut("expert", moe.intermediate, parallel.expert_tp, "expert_tp", precision.experts, always=True)
    yield from _cut("dense layer", model.dense_intermediate, parallel.tp, "tp", precision.dense)
    yield from _cut("shared expert", moe.shared_intermediate, shared_split, "tp", precision.dense)
    yield from _cut("attention output", values, parallel.tp, "tp", precision.projections)


def _cut(what: str, width: int, split: int, key: str, dtype: str, *, always: bool = False) -> Iterator[Finding]:
    """A width over its ranks. always: whole blocks are asked of an uncut width, too, as fused experts do."""
    if width == 0:
        return
    check = f"divides {what} width"
    block = SCALE_BLOCK.get(dtype, 1)
    if width % split == 0 and width // split % block and (split > 1 or always):
        detail = f"{width} columns / {key} {split} = {width // split} is no multiple of {dtype}'s block of {block}"
        if dtype == "fp8_block":
            yield Finding(check, "fault", detail, f"change parallel.{key} or the precision")
        else:
            yield Finding(check, "warn", detail, "engines pad such blocks; priced without the padding")
        return
    yield _divides(check, width, split, f"columns of the {what}", key, f"change parallel.{key}")


def _vocabulary(model: ModelSpec, parallel: ParallelSpec) -> Finding:
    check = "divides vocabulary"
    if model.vocabulary % parallel.tp == 0:
        detail = f"{model.vocabulary} rows / tp {parallel.tp} = {model.vocabulary // parallel.tp}"
        return Finding(check, "ok", detail)
    padded = -(-model.vocabulary // VOCABULARY_BLOCK) * VOCABULARY_BLOCK
    detail = f"{model.vocabulary} rows do not divide by tp {parallel.tp}"
    if padded % parallel.tp:
        return Finding(check, "fault", f"{detail}, nor do the {padded} that engines pad to", "change parallel.tp")
    return Finding(check, "warn", f"{detail}; engines pad to {padded}", "priced without the padding")
