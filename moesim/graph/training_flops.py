"""The model's own FLOP in training: what MFU counts, recomputation and padding left out."""

from __future__ import annotations

from moesim.spec.model import ModelSpec

# A backward pass has two products for each of the forward pass (gradients of input and weights): three times forward,
# as in J. Kaplan et al., arXiv:2001.08361, section 2.1, and Megatron-LM's `num_floating_point_operations`.
TRAINING_OVER_FORWARD = 3


def forward_flops_per_token(model: ModelSpec, sequence_length: int) -> float:
    """FLOP of one token's forward pass in a sequence: 2 for each active weight, and the attention kernel.

    Active: attention, dense, shared and top-k routed experts, gates, the head; the embedding's rows are looked up.
    Attention counts the causal pairs only, (s + 1) / 2 for a token (fewer in layers with a window), as Megatron-LM does
    since it halves them (megatron/training/training.py).
    """
    moe, attention = model.moe, model.attention
    weights = model.layers * attention.parameters(model.hidden)
    weights += model.dense_layers * 3 * model.hidden * model.dense_intermediate
    weights += model.moe_layers * (
        model.hidden * moe.experts + 3 * model.hidden * moe.shared_intermediate + moe.top_k * model.expert_parameters()
    )
    weights += model.vocabulary * model.hidden
    width = attention.heads * (attention.head_dim + attention.value_head_dim)
    causal = (sequence_length + 1) / 2
    window = attention.window or sequence_length
    windowed = len(attention.windowed_layers) if attention.window else 0
    short = window * (1 - (window - 1) / (2 * sequence_length)) if window < sequence_length else causal
    pairs = (model.layers - windowed) * causal + windowed * short
    return 2.0 * weights + 2.0 * width * pairs


def training_flops_per_token(model: ModelSpec, sequence_length: int) -> float:
    """FLOP of one token's forward and backward pass."""
    return TRAINING_OVER_FORWARD * forward_flops_per_token(model, sequence_length)
