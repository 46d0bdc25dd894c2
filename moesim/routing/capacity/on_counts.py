"""Capacity on the counts of a step: how many picks are dropped, from counts alone.

Capacity is kept by source: each rank gives every expert at most its capacity of the rank's own tokens, as GShard,
DeepSpeed and Megatron do before their all-to-all. Counts of a step say how many tokens an expert gets, not from which
rank. Which of the step's tokens picked an expert is taken as independent of their rank: a rank of S of the step's T
tokens then holds a hypergeometric number of an expert's n picks (n of T, drawn S times), and what passes the capacity C
is its expectation E[max(X - C, 0)], exact for that law. With one source that is max(n - C, 0) (tag "formula"); with
several it is "assumed" (under a gate that is even by rule, each rank is even as well: `even_sources`), as tokens of one
rank may agree more than that. Where backups go is assumed as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit

from moesim.routing.capacity.rule import CapacityRule
from moesim.routing.gates.routed import Floats

# Terms of an expectation below this share of its sum end it.
NEGLIGIBLE = 1e-13
# Rounds of handing waiting picks to experts with room, each fills at least one expert or places all.
MAX_ROUNDS = 64


@dataclass(frozen=True)
class CountFlow:
    """Picks by expert, all float64 [steps, layers, experts].

    processed: that each expert works on, backups included. dropped, rerouted: of the expert that was wanted. padded:
    empty rows that it works on as well. routed = processed + dropped, summed over experts. tag: how the numbers are
    known.
    """

    processed: Floats
    dropped: Floats
    rerouted: Floats
    padded: Floats
    tag: str

    @property
    def rows(self) -> Floats:
        """Rows that each expert computes and that travel to it."""
        return self.processed + self.padded


def cap_counts(counts: Floats, source_tokens: Floats, rule: CapacityRule, *, top_k: int) -> CountFlow:
    """Apply a rule to counts [steps, layers, experts] of steps whose ranks hold source_tokens [steps, ranks].

    A fraction of a token is a rank that holds one in that share of the steps: sizes are rounded up and weigh less.
    """
    counts = np.asarray(counts, dtype=np.float64)
    if rule.dropless:
        nothing = np.zeros_like(counts)
        return CountFlow(counts, nothing, nothing, nothing, "formula")
    experts = counts.shape[2]
    tokens = np.asarray(source_tokens, dtype=np.float64)
    size = np.ceil(tokens - 1e-9)
    weight = np.where(size > 0, tokens / np.where(size > 0, size, 1.0), 0.0)
    limit = rule.capacity(size.astype(np.int64), experts, top_k).astype(np.float64)
    over = np.zeros_like(counts)
    if not rule.even_sources:
        _overflow(counts, size, weight, limit, tokens.sum(axis=1), over)
    places = (weight * limit).sum(axis=1)[:, None, None]
    over = np.minimum(np.maximum(over, counts - places), counts)
    kept = counts - over
    placed = np.zeros_like(counts) if rule.backup is None else _placed(rule.backup, counts, over, places - kept)
    waiting, found = over.sum(axis=2, keepdims=True), placed.sum(axis=2, keepdims=True)
    share = np.clip(found / np.where(waiting > 0, waiting, 1.0), 0.0, 1.0)
    processed = kept + placed
    padded = np.maximum(places - processed, 0.0) if rule.pad else np.zeros_like(counts)
    one_source = (tokens > 0).sum(axis=1).max(initial=0) <= 1 and rule.backup is None
    return CountFlow(processed, over * (1.0 - share), over * share, padded, "formula" if one_source else "assumed")


def _placed(backup: str, counts: Floats, over: Floats, room: Floats) -> Floats:
    """Picks that find another expert, by that expert: [steps, layers, experts].

    random: one try, each expert is offered the same. next_best: what waits is offered in proportion to the counts, the
    popular experts being most tokens' next, until all is placed or no expert has room.
    """
    waiting = over.sum(axis=2, keepdims=True)
    if backup == "random":
        return np.asarray(np.minimum(waiting / counts.shape[2], np.maximum(room, 0.0)))
    placed = np.zeros_like(counts)
    free = np.maximum(room, 0.0)
    wish = counts + 1e-12 * counts.sum(axis=2, keepdims=True)
    for _ in range(MAX_ROUNDS):
        open_wish = np.where(free > 0, wish, 0.0)
        total = open_wish.sum(axis=2, keepdims=True)
        offered = waiting * np.where(total > 0, open_wish / np.where(total > 0, total, 1.0), 0.0)
        taken = np.minimum(offered, free)
        placed, free = placed + taken, np.where(offered >= free, 0.0, free - taken)
        waiting = np.maximum(waiting - taken.sum(axis=2, keepdims=True), 0.0)
        if not (waiting > 1e-9).any() or not (free > 0).any():
            break
    return placed


@njit(cache=True)
def _overflow(counts: Floats, size: Floats, weight: Floats, limit: Floats, total: Floats, out: Floats) -> None:
    """Expected picks over capacity, by expert, summed over sources; ranks of one size are worked out once."""
    steps, layers, experts = counts.shape
    ranks = size.shape[1]
    done = np.empty(ranks, np.bool_)
    for step in range(steps):
        most = int(counts[step].max()) + 2
        known = np.empty(most)
        done[:] = False
        for rank in range(ranks):
            if done[rank] or size[step, rank] <= 0.0:
                continue
            times = 0.0
            for other in range(rank, ranks):
                if size[step, other] == size[step, rank]:
                    done[other] = True
                    times += weight[step, other]
            known[:] = -1.0
            for layer in range(layers):
                for e in range(experts):
                    n = counts[step, layer, e]
                    low = int(n)
                    value = 0.0
                    for end in range(2):  # a count between whole numbers is a mix of both
                        share = n - low if end else 1.0 - (n - low)
                        if share > 0.0:
                            if known[low + end] < 0.0:
                                known[low + end] = excess(
                                    float(low + end), total[step], size[step, rank], limit[step, rank]
                                )
                            value += share * known[low + end]
                    out[step, layer, e] += times * value


@njit(cache=True)
def excess(picks: float, tokens: float, held: float, capacity: float) -> float:
    """E[max(X - capacity, 0)] of a hypergeometric X: `picks` of `tokens`, drawn `held` times.

    Summed from the capacity outwards on the side with less in it, so that no cancellation is left.
    """
    everything = max(tokens, picks, held)
    if held >= everything:
        return max(picks - capacity, 0.0)
    mean = picks * held / everything
    least, most = max(0.0, picks + held - everything), min(picks, held)
    if capacity >= most:
        return 0.0
    total = 0.0
    if capacity >= mean:
        x = max(math.floor(capacity) + 1.0, math.ceil(least))
        chance = _chance(x, picks, everything, held)
        while x <= most:
            term = (x - capacity) * chance
            total += term
            if term <= NEGLIGIBLE * total:
                break
            chance *= (picks - x) * (held - x) / ((x + 1.0) * (everything - picks - held + x + 1.0))
            x += 1.0
        return total
    x = math.ceil(capacity) - 1.0
    chance = _chance(x, picks, everything, held) if x >= least else 0.0
    while x >= least and x >= 0.0:
        term = (capacity - x) * chance
        total += term
        if term <= NEGLIGIBLE * total:
            break
        chance *= x * (everything - picks - held + x) / ((picks - x + 1.0) * (held - x + 1.0))
        x -= 1.0
    return mean - capacity + total


@njit(cache=True)
def _chance(x: float, picks: float, tokens: float, held: float) -> float:
    """P(X = x); sizes need not be whole."""
    rest = tokens - picks - held + x
    if x < 0.0 or x > picks or x > held or rest < 0.0:
        return 0.0
    log = (
        math.lgamma(picks + 1.0) - math.lgamma(x + 1.0) - math.lgamma(picks - x + 1.0)
        + math.lgamma(tokens - picks + 1.0) - math.lgamma(held - x + 1.0) - math.lgamma(rest + 1.0)
        - math.lgamma(tokens + 1.0) + math.lgamma(held + 1.0) + math.lgamma(tokens - held + 1.0)
    )  # fmt: skip
    return math.exp(log)
