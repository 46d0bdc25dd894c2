"""Which experts each token picked, and how often two go together: in one layer, and from a layer to the next."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.errors import BadInput

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Ids = NDArray[np.int16]

NONE = -1
"""In place of an expert: the token picked no more, or has no record in that layer."""


@dataclass(frozen=True)
class TokenPicks:
    """Experts by token: ids int16 [tokens, layers, top_k], -1 = none. step: int64 [tokens], row of the step's counts.

    follows: a row is one token in all layers; else rows of two layers have nothing to do with each other. request:
    int64 [tokens], whose token it is; None where that is not known.
    """

    ids: Ids
    step: Ints
    follows: bool
    request: Ints | None = None

    def __post_init__(self) -> None:
        if self.ids.ndim != 3 or self.step.shape != self.ids.shape[:1]:
            raise BadInput(f"picks of shape {self.ids.shape} for {len(self.step)} tokens", mend="give a step for each")
        if self.request is not None and self.request.shape != self.step.shape:
            raise BadInput(f"{len(self.request)} requests for {len(self.step)} tokens", mend="give one for each")

    def of_steps(self, steps: Ints) -> TokenPicks:
        """The tokens of some steps, rising; steps are numbered anew in the order given."""
        at = np.searchsorted(steps, self.step)
        kept = steps[np.minimum(at, len(steps) - 1)] == self.step
        return replace(
            self,
            ids=np.ascontiguousarray(self.ids[kept]),
            step=at[kept],
            request=None if self.request is None else self.request[kept],
        )

    def coactivation(self, experts: int) -> Floats:
        """Chance that a token picks both: float64 [layers, experts, experts], symmetric, 0 on the diagonal."""
        pairs, tokens = _pairs(self.ids, experts)
        whole = (pairs + pairs.transpose(0, 2, 1)).astype(np.float64)
        whole[:, np.arange(experts), np.arange(experts)] = 0.0
        return np.asarray(whole / np.maximum(tokens, 1)[:, None, None])

    def transitions(self, experts: int) -> Floats | None:
        """Chance that a token picks e in a layer and f in the next: float64 [layers - 1, experts, experts].

        None where tokens cannot be followed from layer to layer.
        """
        if not self.follows:
            return None
        pairs, tokens = _onward(self.ids, experts)
        return np.asarray(pairs / np.maximum(tokens, 1)[:, None, None])


@njit(cache=True)
def _pairs(ids: Ids, experts: int) -> tuple[Ints, Ints]:
    """How often two experts are picked together [layers, experts, experts], in order of the picks; tokens [layers]."""
    tokens, layers, top_k = ids.shape
    out = np.zeros((layers, experts, experts), dtype=np.int64)
    seen = np.zeros(layers, dtype=np.int64)
    for layer in range(layers):
        table = out[layer]
        for token in range(tokens):
            some = False
            for j in range(top_k):
                one = ids[token, layer, j]
                if one < 0:
                    continue
                some = True
                for i in range(j):
                    other = ids[token, layer, i]
                    if other >= 0:
                        table[other, one] += 1
            seen[layer] += some
    return out, seen


@njit(cache=True)
def _onward(ids: Ids, experts: int) -> tuple[Ints, Ints]:
    """How often a token goes from an expert to one of the next layer [layers - 1, experts, experts], and tokens."""
    tokens, layers, top_k = ids.shape
    out = np.zeros((max(layers - 1, 0), experts, experts), dtype=np.int64)
    seen = np.zeros(max(layers - 1, 0), dtype=np.int64)
    for layer in range(layers - 1):
        table = out[layer]
        for token in range(tokens):
            some = False
            for j in range(top_k):
                one = ids[token, layer, j]
                if one < 0:
                    continue
                for i in range(top_k):
                    other = ids[token, layer + 1, i]
                    if other >= 0:
                        some = True
                        table[one, other] += 1
            seen[layer] += some
    return out, seen
