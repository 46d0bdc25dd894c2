"""The operations that a step is made of, as frozen values; sizes are arrays, keys are plain.

All arrays of one operation broadcast against each other; the price has the broadcast shape. Everything is per GPU
(one rank), after tensor parallelism has been applied. A size of 0 tokens costs 0 seconds unless the operation says
otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Gemm:
    """[m, k] x [k, n] with weights of `dtype`; m: tokens [...]."""

    m: Floats
    n: int
    k: int
    dtype: str


@dataclass(frozen=True)
class ExpertGemm:
    """SwiGLU of a rank's local experts as a grouped GEMM (gate+up, activation, down).

    tokens: [..., local slots], tokens that each local expert gets: the price has shape [...]. `intermediate` is already
    divided by expert-TP. `grouping`: "deepep_low_latency" (masked), "deepep_normal" (contiguous) or "fused" (one fused
    kernel over all local experts, as under tensor parallelism or all-gather dispatch), as serving engines run them, or
    "grouped" (grouped products alone, as training runs them). `experts` and `top_k` are the
    model's. No tokens at all: 0 seconds.
    """

    tokens: Floats
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    dtype: str
    grouping: Literal["deepep_low_latency", "deepep_normal", "fused", "grouped"]


@dataclass(frozen=True)
class Attention:
    """The attention kernel of one layer (no projections), grouped-query.

    prefill: `batch` sequences [...] of `new_tokens` [...] after `prefix_tokens` [...]; decode: new_tokens is 1 and
    prefix_tokens is the mean KV length of the batch. `heads` and `kv_heads` are per rank.
    """

    phase: Literal["prefill", "decode"]
    batch: Floats
    new_tokens: Floats
    prefix_tokens: Floats
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    kv_dtype: str
    window: int = 0


@dataclass(frozen=True)
class MlaAttention:
    """The multi-head latent attention kernel of one layer (no projections); decode runs absorbed.

    Sizes as in Attention; `heads` per rank; ranks of the compression as in the model.
    """

    phase: Literal["prefill", "decode"]
    batch: Floats
    new_tokens: Floats
    prefix_tokens: Floats
    heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    value_head_dim: int
    dtype: str
    kv_dtype: str


@dataclass(frozen=True)
class MlaAbsorb:
    """The two batched products of absorbed decode: queries into latent space (pre) or values out of it (post)."""

    side: Literal["pre", "post"]
    tokens: Floats
    heads: int
    kv_lora_rank: int
    head_dim: int
    dtype: str


@dataclass(frozen=True)
class MemoryBound:
    """A kernel bound by reading and writing `bytes` [...] of HBM: norms, activations, residuals, quantisation."""

    bytes: Floats
    name: str


@dataclass(frozen=True)
class Collective:
    """A collective among `gpus` ranks spread over `nodes` nodes.

    bytes: [...] as nccl-tests counts a size: all_reduce the reduced buffer; all_gather and reduce_scatter the whole
    (gathered) buffer; all_to_all the whole send buffer of a rank. domains: NVLink domains that the ranks lie in, 0: as
    many as neighbouring nodes do.
    """

    kind: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
    bytes: Floats
    gpus: int
    nodes: int
    domains: int = 0


@dataclass(frozen=True)
class MoeExchange:
    """A DeepEP dispatch or combine over `ep` ranks on `nodes` nodes.

    tokens: [...] tokens per rank of the *balanced* exchange that loads the busiest endpoint as much as this one does
    (traffic.py computes it), so that a hot endpoint is priced by the measured curve. 0 tokens still cost the latency
    of an empty exchange in low-latency mode. domains: as in `Collective`.
    """

    step: Literal["dispatch", "combine"]
    mode: Literal["normal", "low_latency"]
    tokens: Floats
    hidden: int
    top_k: int
    experts: int
    ep: int
    nodes: int
    dtype: str
    domains: int = 0


Operation = Gemm | ExpertGemm | Attention | MlaAttention | MlaAbsorb | MemoryBound | Collective | MoeExchange
