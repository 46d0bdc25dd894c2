"""Experts by the token's id alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.routing.gates.gate import GateChoice
from moesim.routing.gates.routed import Routed, TokenScores

# Multipliers of splitmix64's mixing function (Steele, Lea and Flood, OOPSLA 2014).
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_STEP = np.uint64(0x9E3779B97F4A7C15)


def hash_gate(scores: TokenScores, how: GateChoice, rng: np.random.Generator) -> Routed:
    """A random but fixed table from token ids to experts (hash layers, Roller et al., arXiv:2106.04426).

    With top_k over 1 the experts are neighbours, so that they differ. All weigh the same.
    """
    ids = hashed_experts(scores.need("token_ids", "hash"), scores.experts, how.top_k)
    return Routed(ids, np.full(ids.shape, 1.0 / how.top_k), scores.experts)


def hashed_experts(token_ids: NDArray[np.int64], experts: int, top_k: int) -> NDArray[np.int64]:
    """Experts int64 [tokens, top_k] of token ids [tokens]."""
    first = (mixed(token_ids) % np.uint64(experts)).astype(np.int64)
    return np.asarray((first[:, None] + np.arange(top_k)) % experts)


def mixed(values: NDArray[np.int64]) -> NDArray[np.uint64]:
    """splitmix64 of each value."""
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64) * _STEP + _STEP
        z = (z ^ (z >> np.uint64(30))) * _MIX[0]
        z = (z ^ (z >> np.uint64(27))) * _MIX[1]
        return np.asarray(z ^ (z >> np.uint64(31)))
