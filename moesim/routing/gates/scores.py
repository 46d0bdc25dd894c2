"""Scores of single tokens where only counts or picks were recorded, so that another gate can decide on them.

The model (tag "assumed"): a token's logit for an expert is the expert's preference plus the token's own Gumbel noise,
independent between experts. Under a plain top-k that is successive sampling, whose preferences follow from the shares
exactly (`successive_weights`); under a group-limited gate they are fitted on the sample of noise itself, so that the
model's own gate gives the recorded shares back on it.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moesim.routing.gates import grouped, topk
from moesim.routing.gates.gate import Gate, GateChoice
from moesim.routing.gates.routed import Floats, Ints, TokenScores
from moesim.routing.inclusion import inclusion
from moesim.routing.successive import successive_weights
from moesim.spec.model import MoeSpec

# Rounds of the fit under a group-limited gate; each halves what is left, and the sample's own noise stays.
ROUNDS = 4
# A preference is corrected by this share of the log ratio a round: a group's experts move together and would overshoot.
STEP = 0.8


def own_gate(moe: MoeSpec) -> tuple[Gate, GateChoice]:
    """The model's own gate, as its config describes it: DeepSeek-V3's groups go with sigmoids, V2's with a softmax."""
    choice = GateChoice(moe.top_k, moe.groups, moe.top_groups, scoring=moe.scoring)
    if moe.groups > 1 and moe.top_groups < moe.groups:
        return (grouped.group_limited if moe.scoring == "sigmoid" else grouped.device_limited), choice
    return (topk.sigmoid_topk if moe.scoring == "sigmoid" else topk.softmax_topk), choice


def preferences(shares: Floats, moe: MoeSpec, odds: Floats, *, where: str = "routing") -> Floats:
    """Log weights [experts] under which the model's own gate picks by `shares` [experts].

    odds: float64 [tokens, experts], exp of the sample's Gumbel noise.
    """
    chance = inclusion(shares, moe.top_k, where=where)
    found = np.log(successive_weights(chance, moe.top_k))
    gate, choice = own_gate(moe)
    if choice.groups == 1 or choice.top_groups >= choice.groups:
        return found
    wanted = chance * len(odds)
    for _ in range(ROUNDS):
        got = counts_of_groups(gate is grouped.group_limited, found, odds, choice)
        found = found + STEP * np.log((wanted + 0.5) / (got + 0.5))
    return np.asarray(found - np.log(np.exp(found - found.max()).sum()) - found.max())


def counts_of_groups(two_best: bool, preference: Floats, odds: Floats, choice: GateChoice) -> Floats:
    """Counts [experts] that group_limited (two_best) or device_limited gives on the sample: the same, compiled."""
    kept = grouped.BEST_OF_GROUP if two_best else 1
    sigmoids = choice.scoring == "sigmoid"
    counts = limited_counts(np.exp(preference), odds, choice.groups, choice.top_groups, choice.top_k, kept, sigmoids)
    return np.asarray(counts)


@njit(cache=True)
def limited_counts(
    weights: Floats, odds: Floats, groups: int, top_groups: int, top_k: int, kept: int, sigmoids: bool
) -> Floats:
    """Counts [experts] of a group-limited gate on exp(logits) = weights [experts] x odds [tokens, experts], compiled.

    kept: best experts that rate a group (2: group_limited, 1: device_limited). The same answer as those gates.
    """
    tokens, experts = odds.shape
    size = experts // groups
    counts = np.zeros(experts)
    score = np.empty(experts)
    rated = np.empty(groups)
    value = np.empty(top_k)
    place = np.empty(top_k, np.int64)
    for token in range(tokens):
        for group in range(groups):
            first = second = 0.0
            for e in range(group * size, (group + 1) * size):
                x = weights[e] * odds[token, e]
                x = x / (1.0 + x) if sigmoids else x
                score[e] = x
                if x > first:
                    second, first = first, x
                elif x > second:
                    second = x
            rated[group] = first + (second if kept > 1 else 0.0)
        held = 0
        for _ in range(top_groups):
            group = int(rated.argmax())
            rated[group] = -1.0
            for e in range(group * size, (group + 1) * size):
                x = score[e]
                if held == top_k and x <= value[held - 1]:
                    continue
                at = held if held < top_k else top_k - 1
                while at > 0 and value[at - 1] < x:
                    value[at], place[at] = value[at - 1], place[at - 1]
                    at -= 1
                value[at], place[at] = x, e
                held = min(held + 1, top_k)
        for at in range(held):
            counts[place[at]] += 1.0
    return counts


def scores_of_trace(ids: Ints, preference: Floats, rng: np.random.Generator) -> TokenScores:
    """Logits [tokens, experts] under which recorded ids [tokens, top_k] are the largest, best first.

    preference: log weights [experts]. The experts that were not picked follow exactly: Gumbel scores cut off at the
    least picked one (Kool, van Hoof and Welling, arXiv:1903.06059, appendix B). Those that were are drawn and sorted
    into the recorded order.
    """
    rows = np.arange(len(ids))[:, None]
    free = preference + rng.gumbel(size=(len(ids), len(preference)))
    picked = -np.sort(-free[rows, ids], axis=1)
    edge = picked[:, -1:]
    logits = np.minimum(-np.logaddexp(-edge, -free), np.nextafter(edge, -np.inf))
    logits[rows, ids] = picked
    return TokenScores(logits)
