"""The experts with the largest scores: softmax, sigmoid, and with a bias that evens loads without a loss."""

from __future__ import annotations

import numpy as np

from moesim.routing.gates.gate import GateChoice
from moesim.routing.gates.routed import Floats, Routed, TokenScores, best, normalised, sigmoid, softmax, taken

# Step of the bias after each batch (DeepSeek-V3, arXiv:2412.19437, section 4.2: "bias update speed" 0.001).
BIAS_STEP = 0.001


def softmax_topk(scores: TokenScores, how: GateChoice, rng: np.random.Generator) -> Routed:
    """Softmax over all experts, the top_k largest; Mixtral and Qwen3 renormalise over those (arXiv:2401.04088)."""
    return pick(scores, softmax(scores.logits), softmax(scores.logits), how)


def sigmoid_topk(scores: TokenScores, how: GateChoice, rng: np.random.Generator) -> Routed:
    """A sigmoid for each expert, the top_k largest, renormalised over those (DeepSeek-V3 without bias and groups)."""
    found = sigmoid(scores.logits)
    return pick(scores, scores.logits, found, how)  # by logits: sigmoids of large logits tie at 1


def bias_corrected(scores: TokenScores, how: GateChoice, rng: np.random.Generator) -> Routed:
    """Picks by score + bias, weighs by the score alone (auxiliary-loss-free balancing, arXiv:2408.15664)."""
    found = sigmoid(scores.logits) if how.scoring == "sigmoid" else softmax(scores.logits)
    return pick(scores, found + (0.0 if scores.bias is None else scores.bias), found, how)


def updated_bias(bias: Floats, counts: Floats, step: float = BIAS_STEP) -> Floats:
    """The bias [experts] after a batch: up by `step` for experts below the mean count, down for those above."""
    return np.asarray(bias + step * np.sign(counts.mean() - counts))


def pick(scores: TokenScores, key: Floats, weights: Floats, how: GateChoice) -> Routed:
    """The top_k experts by `key` [tokens, experts], weighed by `weights`."""
    ids = best(key, how.top_k)
    held = taken(weights, ids)
    return Routed(ids, normalised(held) if how.normalise else held, scores.experts)
