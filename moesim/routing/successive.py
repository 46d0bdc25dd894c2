"""Top-k picks by Gumbel scores, drawn without the scores: fast ids, exact chances, and the weights behind a profile.

Adding Gumbel noise to log weights and taking the k largest is successive sampling: pick by the weights, leave out what
was picked, pick again (Plackett-Luce; Yellott, J. Math. Psychology 15, 1977; Kool, van Hoof and Welling,
arXiv:1903.06059). So a token needs about k uniform numbers instead of one for each expert: pick by an alias table and
pick again on a repeat.

The chance that an expert is among the k comes from the same race read in time: expert e arrives after an exponential
time of rate w_e, the first k are picked, and pi_e is the integral over t of its density w_e exp(-w_e t) times the
chance that fewer than k of the others have arrived.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.routing.sample import _alias

Floats = NDArray[np.float64]

# Nodes of the integral over the time at which an expert arrives: at 64 the chances of 256 experts sum to k within 1e-8.
NODES = 64
# The fixed point that finds weights stops at this error of a chance.
TOLERANCE = 1e-7
MAX_ROUNDS = 60
# An expert nobody picks keeps this chance, so that it has a weight; one that all pick stays this far from 1.
EDGE = 1e-9


@dataclass(frozen=True)
class SuccessiveSampler:
    """Gumbel top-k draws for fixed weights float64 [layers, experts]; make it with `prepare_successive`."""

    top_k: int
    weights: Floats
    limit: Floats
    other: NDArray[np.int64]

    def ids(self, layer: int, tokens: int, rng: np.random.Generator) -> NDArray[np.int32]:
        """Experts int32 [tokens, top_k] of one layer, in the order in which they were picked (best score first)."""
        out = np.empty((1, tokens, self.top_k), dtype=np.int32)
        one = slice(layer, layer + 1)
        _draw_layers(self.limit[one], self.other[one], rng, out)
        return np.asarray(out[0])

    def step(self, tokens: int, rng: np.random.Generator) -> NDArray[np.int32]:
        """Experts int32 [layers, tokens, top_k] of one step."""
        out = np.empty((len(self.weights), tokens, self.top_k), dtype=np.int32)
        _draw_layers(self.limit, self.other, rng, out)
        return out


def prepare_successive(weights: Floats, top_k: int) -> SuccessiveSampler:
    """Prepare draws whose weights [layers, experts] are exp(logits), at least top_k of them positive.

    Raises BadInput otherwise.
    """
    rows = np.atleast_2d(np.asarray(weights, dtype=np.float64))
    if not np.isfinite(rows).all() or (rows < 0).any() or ((rows > 0).sum(axis=1) < top_k).any() or top_k < 1:
        raise BadInput(f"fewer than {top_k} experts have a positive weight", mend="give exp(logits) of each expert")
    tables = [_alias(np.ascontiguousarray(row)) for row in rows]
    return SuccessiveSampler(
        top_k, rows, np.stack([limit for limit, _ in tables]), np.stack([other for _, other in tables])
    )


def gumbel_topk_ids(logits: Floats, top_k: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """The plain way, for tokens that each have their own logits [tokens, experts]: int64 [tokens, top_k]."""
    scores = logits + rng.gumbel(size=logits.shape)
    return np.argsort(-scores, axis=1)[:, :top_k]


def successive_inclusion(weights: Floats, top_k: int) -> Floats:
    """Chance [..., experts] that each expert is among the top_k, by numerical integration; rows sum to top_k."""
    rows = np.ascontiguousarray(np.atleast_2d(np.asarray(weights, dtype=np.float64)))
    nodes, areas = np.polynomial.legendre.leggauss(NODES)
    out = np.empty_like(rows)
    for row, found in zip(rows, out, strict=True):
        _inclusion(row / row.sum(), top_k, (nodes + 1.0) / 2.0, areas / 2.0, found)
    return out.reshape(np.shape(weights))


def successive_weights(chance: Floats, top_k: int) -> Floats:
    """Weights [..., experts] (sum 1) whose Gumbel top-k picks each expert with `chance` (rows sum to top_k)."""
    rows = np.ascontiguousarray(np.clip(np.atleast_2d(chance), EDGE, 1.0 - EDGE))
    nodes, areas = np.polynomial.legendre.leggauss(NODES)
    out = np.empty_like(rows)
    for row, found in zip(rows, out, strict=True):
        if top_k == rows.shape[1]:
            found[:] = 1.0 / top_k
        else:
            _solve(row, top_k, (nodes + 1.0) / 2.0, areas / 2.0, found)
    return out.reshape(np.shape(chance))


@njit(cache=True)
def _draw_layers(limit: Floats, other: NDArray[np.int64], rng: np.random.Generator, out: NDArray[np.int32]) -> None:
    layers, tokens, top_k = out.shape
    experts = limit.shape[1]
    for layer in range(layers):
        seen = np.full(experts, -1, np.int64)
        for token in range(tokens):
            taken = 0
            while taken < top_k:
                u = rng.random() * experts
                e = int(u)
                if u - e >= limit[layer, e]:
                    e = other[layer, e]
                if seen[e] != token:
                    seen[e] = token
                    out[layer, token, taken] = e
                    taken += 1


@njit(cache=True)
def _inclusion(weights: Floats, top_k: int, nodes: Floats, areas: Floats, out: Floats) -> None:
    """Integrate over the time t at which an expert arrives, t between 0 and when the top_k are surely complete.

    The chance is 1 - E[exp(-w_e T)] with T the time of the k-th arrival among the others: pi_e = integral of
    w_e exp(-w_e t) P(fewer than top_k of the others by t) dt.
    """
    experts = weights.shape[0]
    out[:] = 0.0
    # End: more than top_k + 12 sqrt(top_k) + 30 arrivals are expected, or nearly all experts have arrived.
    wanted = min(top_k + 12.0 * np.sqrt(top_k) + 30.0, experts - 1e-9)
    high = 1.0
    while (1.0 - np.exp(-weights * high)).sum() < wanted and high < 1e9:
        high *= 2.0
    low = 0.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        if (1.0 - np.exp(-weights * middle)).sum() < wanted:
            low = middle
        else:
            high = middle
    suffix = np.empty((experts + 1, top_k))
    prefix = np.empty(top_k)
    for node in range(nodes.shape[0]):
        # t = high * s^2 puts nodes where few have arrived.
        t = high * nodes[node] * nodes[node]
        area = areas[node] * 2.0 * high * nodes[node]
        suffix[experts, :] = 0.0
        suffix[experts, 0] = 1.0
        for e in range(experts - 1, -1, -1):
            stay = np.exp(-weights[e] * t)
            suffix[e, 0] = stay * suffix[e + 1, 0]
            for j in range(1, top_k):
                suffix[e, j] = stay * suffix[e + 1, j] + (1.0 - stay) * suffix[e + 1, j - 1]
        prefix[:] = 0.0
        prefix[0] = 1.0
        for e in range(experts):
            stay = np.exp(-weights[e] * t)
            fewer = 0.0
            reached = 0.0
            for j in range(top_k - 1, -1, -1):  # prefix j with at most top_k - 1 - j after it
                reached += suffix[e + 1, top_k - 1 - j]
                fewer += prefix[j] * reached
            out[e] += area * weights[e] * stay * fewer
            for j in range(top_k - 1, 0, -1):
                prefix[j] = stay * prefix[j] + (1.0 - stay) * prefix[j - 1]
            prefix[0] *= stay


@njit(cache=True)
def _solve(chance: Floats, top_k: int, nodes: Floats, areas: Floats, out: Floats) -> None:
    """Fixed point: with the time scale held, pi = 1 - exp(-w t); scale each weight by the ratio of those exponents."""
    experts = chance.shape[0]
    target = -np.log1p(-chance)
    out[:] = target / target.sum()
    found = np.empty(experts)
    for _ in range(MAX_ROUNDS):
        _inclusion(out, top_k, nodes, areas, found)
        worst = 0.0
        for e in range(experts):
            held = min(max(found[e], 1e-12), 1.0 - 1e-12)
            worst = max(worst, abs(found[e] - chance[e]))
            out[e] *= target[e] / -np.log1p(-held)
        out /= out.sum()
        if worst < TOLERANCE:
            break
