"""Gates under which tokens differ in how many experts they take, or take all."""

from __future__ import annotations

import numpy as np

from moesim.errors import BadInput
from moesim.routing.gates.gate import GateChoice
from moesim.routing.gates.routed import NO_EXPERT, Routed, TokenScores, best, normalised, sigmoid, softmax, taken


def top_p(scores: TokenScores, how: GateChoice, rng: np.random.Generator) -> Routed:
    """The fewest experts whose softmax adds up to `threshold`, at most max_k (Huang et al., arXiv:2403.07652)."""
    chance = softmax(scores.logits)
    ids = best(chance, min(how.max_k, scores.experts))
    held = taken(chance, ids)
    before = np.cumsum(held, axis=1) - held
    kept = before < how.threshold
    kept[:, 0] = True
    ids, weights = np.where(kept, ids, NO_EXPERT), np.where(kept, held, 0.0)
    return Routed(ids, normalised(weights) if how.normalise else weights, scores.experts)


def dense(scores: TokenScores, how: GateChoice, rng: np.random.Generator) -> Routed:
    """Every token to every expert, weighed by the softmax (Jacobs et al., Neural Computation 3, 1991)."""
    chance = softmax(scores.logits)
    ids = best(chance, scores.experts)
    return Routed(ids, taken(chance, ids), scores.experts)


def soft(scores: TokenScores, how: GateChoice, rng: np.random.Generator) -> Routed:
    """Soft MoE (Puigcerver et al., arXiv:2308.00951): an expert works on top_k x tokens / experts mixtures of all
    tokens, so each gets equally many rows. Told as slots: row t of the answer is slot t of one expert, weight 1.

    Raises BadInput where the slots do not divide evenly.
    """
    slots = scores.tokens * how.top_k
    if slots % scores.experts:
        raise BadInput(
            f"{slots} slots do not divide by {scores.experts} experts",
            where="gate",
            mend="give a multiple of the experts as tokens",
        )
    each = slots // scores.experts
    rows = np.repeat(np.arange(scores.experts), each).reshape(how.top_k, scores.tokens).T
    return Routed(np.ascontiguousarray(rows), np.ones(rows.shape), scores.experts)


def sampled(scores: TokenScores, how: GateChoice, rng: np.random.Generator) -> Routed:
    """One decision for all tokens of a sample or a task (task-level MoE, Kudugunta et al., arXiv:2110.03742): the
    top_k of the mean score of the tokens that share `request`.
    """
    request = scores.need("request", "sample")
    found = sigmoid(scores.logits) if how.scoring == "sigmoid" else softmax(scores.logits)
    _, row = np.unique(request, return_inverse=True)
    total = np.zeros((int(row.max(initial=-1)) + 1, scores.experts))
    np.add.at(total, row, found)
    mean = total / np.maximum(np.bincount(row, minlength=len(total)), 1)[:, None]
    ids = best(mean, how.top_k)
    weights = taken(mean, ids)
    return Routed(ids[row], (normalised(weights) if how.normalise else weights)[row], scores.experts)
