"""A gate that prefers experts near the token."""

from __future__ import annotations

import numpy as np

from moesim.routing.gates.gate import GateChoice
from moesim.routing.gates.routed import Routed, TokenScores, softmax
from moesim.routing.gates.topk import pick


def topology_bias(scores: TokenScores, how: GateChoice, rng: np.random.Generator) -> Routed:
    """Picks by logit + `locality` for experts on the token's own node, weighs by the softmax alone.

    The inference form of topology-aware gates, which TA-MoE (arXiv:2302.09915) trains for with a loss and FasterMoE
    (PPoPP 2022, doi 10.1145/3503221.3508418) applies to the scores.
    """
    source, home = scores.need("source_node", "topology"), scores.need("expert_node", "topology")
    near = source[:, None] == home[None, :]
    return pick(scores, scores.logits + how.locality * near, softmax(scores.logits), how)
