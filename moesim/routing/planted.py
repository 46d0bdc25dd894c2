"""Traces whose experts go together in a way that is known, to judge placements that look for it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.routing.picks import TokenPicks
from moesim.routing.trace import RoutingCounts


def planted_trace(
    *,
    tokens: int,
    layers: int,
    experts: int,
    top_k: int,
    communities: int,
    inside: float,
    follow: float,
    rng: np.random.Generator,
    skew: float = 0.3,
    steps: int = 32,
) -> tuple[RoutingCounts, NDArray[np.int64]]:
    """A trace, and the community of each expert int64 [layers, experts]: as many experts in each, shuffled by layer.

    A token has one community in each layer, evenly; with the chance `follow` it is that of the layer before. Each of
    its top_k picks is drawn from its community with the chance `inside`, else from all experts, never one twice.
    skew: spread of an expert's log weight inside its community; every community weighs the same. With one community, or
    inside 0, nothing is planted: picks are independent of each other. Raises BadInput where communities do not divide
    the experts or are smaller than top_k.
    """
    size = experts // communities
    if experts % communities or size < top_k:
        raise BadInput(
            f"{communities} communities of {experts} experts, {top_k} picks", mend="give communities of top_k or more"
        )
    home = np.empty((layers, experts), dtype=np.int64)
    ids = np.empty((tokens, layers, top_k), dtype=np.int16)
    kind = rng.integers(0, communities, tokens)
    for layer in range(layers):
        order = rng.permutation(experts).reshape(communities, size)
        home[layer, order] = np.arange(communities)[:, None]
        fresh = rng.random(tokens) >= follow
        kind = np.where(fresh, rng.integers(0, communities, tokens), kind)
        weight = np.exp(skew * rng.standard_normal((communities, size)))
        log_weight = np.empty(experts)
        log_weight[order] = np.log(weight / weight.sum(axis=1, keepdims=True))
        # Gumbel top-k twice: inside the token's community, and over all experts; each pick takes the next of either.
        everywhere = np.argsort(-(log_weight + rng.gumbel(size=(tokens, experts))), axis=1)[:, : 2 * top_k]
        scores = log_weight[order[kind]] + rng.gumbel(size=(tokens, size))
        local = np.take_along_axis(order[kind], np.argsort(-scores, axis=1), axis=1)[:, :top_k]
        ids[:, layer] = _mixed(local, everywhere, rng.random((tokens, top_k)) < inside)
    step = np.arange(tokens) * steps // tokens
    counts = np.zeros((steps, layers, experts))
    np.add.at(counts, (step[:, None, None], np.arange(layers)[None, :, None], ids.astype(np.int64)), 1.0)
    picks = TokenPicks(ids, step, follows=True)
    name = f"planted {communities} x {inside:g}" if communities > 1 and inside > 0 else "no structure"
    return RoutingCounts(counts, np.arange(layers), layers, name, per_step=True, tokens=picks), home


def _mixed(local: NDArray[np.int64], everywhere: NDArray[np.int64], inside: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Each pick [tokens, top_k] is the next of its token's local or global order that it has not picked yet."""
    tokens, top_k = inside.shape
    out = np.full((tokens, top_k), -1, dtype=np.int64)
    both = np.concatenate([local, everywhere], axis=1)
    used = np.zeros(both.shape, dtype=bool)
    is_local = np.arange(both.shape[1]) < local.shape[1]
    for pick in range(top_k):
        free = ~used & (is_local == inside[:, pick, None])
        chosen = both[np.arange(tokens), free.argmax(axis=1)]
        out[:, pick] = chosen
        used |= both == chosen[:, None]
    return out
