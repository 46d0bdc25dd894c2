"""Gates that open a few groups of experts first: DeepSeek-V3's groups, DeepSeek-V2's devices, two levels."""

from __future__ import annotations

import numpy as np

from moesim.errors import BadInput
from moesim.routing.gates.gate import GateChoice
from moesim.routing.gates.routed import Floats, Routed, TokenScores, best, sigmoid, softmax, taken
from moesim.routing.gates.topk import pick

# DeepSeek-V3 rates a group by the sum of its two best experts (arXiv:2412.19437, section 2.1.2; `MoEGate` in the
# model's modeling_deepseek.py, topk_method noaux_tc).
BEST_OF_GROUP = 2


def group_limited(scores: TokenScores, how: GateChoice, rng: np.random.Generator) -> Routed:
    """DeepSeek-V3: the top_groups groups by the sum of their two best biased scores, the top_k experts in those."""
    found = sigmoid(scores.logits) if how.scoring == "sigmoid" else softmax(scores.logits)
    biased = found + (0.0 if scores.bias is None else scores.bias)
    by_group = in_groups(biased, how.groups)
    kept = min(BEST_OF_GROUP, by_group.shape[2])
    rated = np.partition(by_group, by_group.shape[2] - kept, axis=2)[..., -kept:].sum(axis=2)
    return pick(scores, only_open(biased, rated, how), found, how)


def device_limited(scores: TokenScores, how: GateChoice, rng: np.random.Generator) -> Routed:
    """DeepSeek-V2: the top_groups devices by their best expert, the top_k experts on those (arXiv:2405.04434, 2.2.2).

    The model's code calls it group_limited_greedy, n_group devices of which topk_group are opened.
    """
    found = softmax(scores.logits) if how.scoring == "softmax" else sigmoid(scores.logits)
    return pick(scores, only_open(found, in_groups(found, how.groups).max(axis=2), how), found, how)


def two_level(scores: TokenScores, how: GateChoice, rng: np.random.Generator) -> Routed:
    """A softmax over groups (nodes), then one inside each opened group (SMILE, arXiv:2212.05191; hierarchical MoE,
    arXiv:1701.06538, appendix B). A group's logit is the log-sum-exp of its experts'; top_k is shared by the groups.

    Raises BadInput when top_k does not divide by top_groups.
    """
    if how.top_k % how.top_groups:
        raise BadInput(
            f"top_k {how.top_k} does not divide by {how.top_groups} groups",
            where="gate.top_groups",
            mend="choose a divisor",
        )
    by_group = in_groups(scores.logits, how.groups)
    peak = by_group.max(axis=2, keepdims=True)
    of_group = peak[..., 0] + np.log(np.exp(by_group - peak).sum(axis=2))
    opened = best(of_group, how.top_groups)  # [tokens, top_groups]
    inside = np.take_along_axis(by_group, opened[..., None], axis=1)  # [tokens, top_groups, size]
    each, size = how.top_k // how.top_groups, by_group.shape[2]
    if each > size:
        raise BadInput(f"{each} experts are wanted of a group of {size}", where="gate.top_k", mend="open more groups")
    local = best(inside.reshape(-1, size), each)
    weights = taken(softmax(inside.reshape(-1, size)), local).reshape(scores.tokens, how.top_k)
    weights = weights * np.repeat(taken(softmax(of_group), opened), each, axis=1)
    ids = local.reshape(scores.tokens, -1) + np.repeat(opened * size, each, axis=1)
    order = np.argsort(-weights, axis=1, kind="stable")
    ids, weights = np.take_along_axis(ids, order, axis=1), np.take_along_axis(weights, order, axis=1)
    if how.normalise:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return Routed(ids, weights, scores.experts)


def in_groups(values: Floats, groups: int) -> Floats:
    """[tokens, experts] as [tokens, groups, experts of one]. Raises BadInput where they do not divide."""
    tokens, experts = values.shape
    if groups < 1 or experts % groups:
        raise BadInput(
            f"{experts} experts do not divide into {groups} groups", where="gate.groups", mend="choose a divisor"
        )
    return values.reshape(tokens, groups, experts // groups)


def only_open(values: Floats, rated: Floats, how: GateChoice) -> Floats:
    """Values with -inf outside the top_groups groups by `rated` [tokens, groups].

    Raises BadInput where the open groups hold fewer than top_k experts.
    """
    size = values.shape[1] // how.groups
    if not 1 <= how.top_groups <= how.groups or how.top_groups * size < how.top_k:
        raise BadInput(
            f"{how.top_groups} of {how.groups} groups hold {how.top_groups * size} experts, top_k is {how.top_k}",
            where="gate.top_groups",
            mend="open groups that hold at least top_k experts",
        )
    shut = np.full(rated.shape, -np.inf)
    np.put_along_axis(shut, best(rated, how.top_groups), 0.0, axis=1)
    return np.asarray(values + np.repeat(shut, size, axis=1))
