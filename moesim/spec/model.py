"""What a model is, as far as its cost goes: layers, attention, experts, and the bytes they weigh."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moesim.spec.base import Spec
from moesim.units import BYTES_PER_ELEMENT


class AttentionSpec(Spec):
    """Attention of one layer: grouped-query (`gqa`) or multi-head latent (`mla`, DeepSeek-V2 arXiv:2405.04434)."""

    kind: Literal["gqa", "mla"]
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0, description="query and key width of one head (mla: nope + rope)")
    value_head_dim: int = Field(gt=0)
    q_lora_rank: int = Field(default=0, ge=0, description="mla; 0 = queries are not compressed")
    kv_lora_rank: int = Field(default=0, ge=0, description="mla")
    qk_rope_head_dim: int = Field(default=0, ge=0, description="mla")
    window: int = Field(default=0, ge=0, description="sliding window in tokens, 0 = none")
    windowed_layers: tuple[int, ...] = Field(default=(), description="layers that use the window")
    index_heads: int = Field(default=0, ge=0, description="heads of a sparse-attention indexer (DeepSeek-V3.2, GLM-5)")
    index_head_dim: int = Field(default=0, ge=0, description="width of one indexer head; 0 = no indexer")
    index_top_k: int = Field(default=0, ge=0, description="tokens that the indexer leaves to attention; 0 = all")
    norm_across_heads: bool = Field(
        default=False, description="queries and keys are normalised over all heads, so that TP ranks sum squares"
    )

    def kv_elements_per_token(self) -> int:
        """Elements that one token leaves in the KV cache of one layer, before tensor parallelism."""
        if self.kind == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return self.kv_heads * (self.head_dim + self.value_head_dim)

    def copies(self, tp: int) -> int:
        """How often a TP group keeps each token: MLA's latent on every rank, a KV head on those beyond one for each."""
        return tp if self.kind == "mla" else max(1, tp // self.kv_heads)

    def parameters(self, hidden: int) -> int:
        """Weights of one layer's attention projections."""
        if self.kind == "mla":
            nope = self.head_dim - self.qk_rope_head_dim
            query = (
                hidden * self.q_lora_rank + self.q_lora_rank * self.heads * self.head_dim
                if self.q_lora_rank
                else hidden * self.heads * self.head_dim
            )
            compress = hidden * (self.kv_lora_rank + self.qk_rope_head_dim)
            expand = self.kv_lora_rank * self.heads * (nope + self.value_head_dim)
            indexer = (self.q_lora_rank * self.index_heads + hidden) * self.index_head_dim + hidden * self.index_heads
            return query + compress + expand + self.heads * self.value_head_dim * hidden + indexer
        return (
            hidden * self.heads * self.head_dim
            + hidden * self.kv_heads * (self.head_dim + self.value_head_dim)
            + self.heads * self.value_head_dim * hidden
        )


class MoeSpec(Spec):
    """The routed experts of a model; every MoE layer is alike."""

    experts: int = Field(gt=0)
    top_k: int = Field(gt=0)
    intermediate: int = Field(gt=0, description="width of one expert's SwiGLU")
    shared_experts: int = Field(default=0, ge=0)
    shared_intermediate: int = Field(default=0, ge=0, description="width of all shared experts together")
    layer_ids: tuple[int, ...] = Field(min_length=1, description="absolute indices of the MoE layers")
    groups: int = Field(default=1, ge=1, description="expert groups of group-limited gating (n_group)")
    top_groups: int = Field(default=1, ge=1, description="groups that a token may use (topk_group)")
    scoring: Literal["softmax", "sigmoid"] = "softmax"

    @model_validator(mode="after")
    def _possible(self) -> MoeSpec:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than the {self.experts} experts")
        return self


class ModelSpec(Spec):
    """A decoder-only transformer with MoE layers, as its Hugging Face `config.json` describes it."""

    id: str
    source: str = Field(description="where the facts come from")
    layers: int = Field(gt=0)
    hidden: int = Field(gt=0)
    vocabulary: int = Field(gt=0)
    dense_intermediate: int = Field(ge=0, description="width of the dense layers' SwiGLU; 0 = no dense layers")
    tied_embeddings: bool = False
    attention: AttentionSpec
    moe: MoeSpec
    mtp_layers: int = Field(default=0, ge=0, description="multi-token-prediction layers beside `layers`")

    @model_validator(mode="after")
    def _layers_exist(self) -> ModelSpec:
        if any(not 0 <= layer < self.layers for layer in self.moe.layer_ids):
            raise ValueError(f"an MoE layer lies outside 0 to {self.layers - 1}")
        if len(self.moe.layer_ids) < self.layers and self.dense_intermediate == 0:
            raise ValueError("there are dense layers, but dense_intermediate is 0")
        return self

    @property
    def moe_layers(self) -> int:
        """Number of MoE layers."""
        return len(self.moe.layer_ids)

    @property
    def dense_layers(self) -> int:
        """Number of layers with a dense feed-forward."""
        return self.layers - len(self.moe.layer_ids)

    def expert_parameters(self) -> int:
        """Weights of one routed expert of one layer (gate, up and down projection)."""
        return 3 * self.hidden * self.moe.intermediate

    def kv_bytes_per_token(self, dtype: str) -> float:
        """Bytes that one token keeps in the KV cache over all layers, before tensor parallelism.

        An indexer keeps its key in FP8 with the scale beside it (DeepSeek-V3.2-Exp, `inference/model.py`). Layers with
        a sliding window are counted like the others: an upper bound.
        """
        latent = self.attention.kv_elements_per_token() * BYTES_PER_ELEMENT[dtype]
        return self.layers * (latent + self.attention.index_head_dim * BYTES_PER_ELEMENT["fp8_block"])

    def parameters(self) -> int:
        """All weights: embeddings, attention, dense, shared and routed experts, gates (norms left out: < 0.01 %)."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied_embeddings else 2)
        attention = self.layers * self.attention.parameters(self.hidden)
        dense = self.dense_layers * 3 * self.hidden * self.dense_intermediate
        gate = self.moe_layers * self.hidden * self.moe.experts
        shared = self.moe_layers * 3 * self.hidden * self.moe.shared_intermediate
        routed = self.moe_layers * self.moe.experts * self.expert_parameters()
        return embeddings + attention + dense + gate + shared + routed
