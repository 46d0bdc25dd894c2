"""The one interface of all gates, and the parameters that they may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moesim.routing.gates.routed import Routed, TokenScores


@dataclass(frozen=True)
class GateChoice:
    """Resolved parameters; a gate reads those that it knows.

    top_k: experts of a token (mean, where that varies). groups, top_groups: of group- or device-limited gates and of
    two-level ones. scoring: "softmax" or "sigmoid". normalise: weights of a token sum to 1. noise: standard
    deviation of Gaussian noise on a logit; temperature: of Gumbel noise. threshold, max_k: of top-p. locality: added to
    the logits of experts on the token's own node. block: tokens assigned together by the balanced gate.
    """

    top_k: int
    groups: int = 1
    top_groups: int = 1
    scoring: str = "softmax"
    normalise: bool = True
    noise: float = 1.0
    temperature: float = 1.0
    threshold: float = 0.4
    max_k: int = 8
    locality: float = 1.0
    block: int = 512


class Gate(Protocol):
    """Decides for the tokens of one layer; pure, apart from the generator that it draws from."""

    def __call__(self, scores: TokenScores, how: GateChoice, rng: np.random.Generator) -> Routed:
        """Route [tokens, experts] scores. Raises BadInput where it lacks an input or cannot keep its own rule."""
        ...
