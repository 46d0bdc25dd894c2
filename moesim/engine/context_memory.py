"""What GPUs that split contexts hold for exchanging queries, partial outputs and latents."""

from __future__ import annotations

from moesim.spec.model import ModelSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import PrecisionSpec
from moesim.spec.workload import BatchingSpec
from moesim.units import BYTES_PER_ELEMENT

# vLLM reads the context before a prompt's chunk in pieces of so many tokens at most, and gathers each where it is split
# (vllm's MLA attention, determine_chunked_prefill_workspace_size).
GATHERED_TOKENS = 64 * 1024


def split_context_bytes(
    model: ModelSpec, parallel: ParallelSpec, precision: PrecisionSpec, batching: BatchingSpec
) -> float:
    """Gathered queries, partial outputs and their copy in order of heads, where contexts are split: else nothing.

    Of every token of the largest batch in grouped-query attention, of the tokens that decode in MLA, whose prompts
    gather latents instead: as many as the part of vLLM's workspace that it adds for them (`MlaCommonMetadataBuilder`).
    """
    if parallel.decode_cp == 1:
        return 0.0
    spec, size = model.attention, BYTES_PER_ELEMENT[precision.activations]
    heads = spec.heads // parallel.tp * parallel.decode_cp
    if spec.kind == "gqa":
        return batching.max_batch_tokens_per_dp_rank * heads * (spec.head_dim + 2.0 * spec.value_head_dim) * size
    latent = spec.kv_lora_rank + spec.qk_rope_head_dim
    queries = batching.max_running_requests_per_dp_rank * heads * (latent + 2.0 * spec.kv_lora_rank) * size
    return queries + GATHERED_TOKENS / parallel.decode_cp * latent * size
