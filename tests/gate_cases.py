"""Tokens that every gate can decide on."""

from __future__ import annotations

import numpy as np

from moesim.routing.gates.gate import GateChoice
from moesim.routing.gates.routed import TokenScores


def scores_for(tokens: int, experts: int, seed: int, *, scale: float = 1.5, nodes: int = 2) -> TokenScores:
    """Random logits with every optional column."""
    rng = np.random.default_rng(seed)
    return TokenScores(
        rng.normal(size=(tokens, experts)) * scale + rng.normal(size=experts),
        token_ids=rng.integers(0, 50_000, tokens),
        request=np.sort(rng.integers(0, max(tokens // 4, 1), tokens)),
        source_node=rng.integers(0, nodes, tokens),
        expert_node=np.arange(experts) * nodes // experts,
        bias=rng.normal(size=experts) * 0.05,
    )


def choice_for(name: str, *, top_k: int, groups: int = 4, top_groups: int = 2) -> GateChoice:
    """A choice that a gate accepts."""
    top_k = 1 if name == "base" else top_k
    return GateChoice(top_k, groups, top_groups, scoring="sigmoid", max_k=top_k, threshold=0.5, block=64)
