"""How often an expert that a step picks is still on the GPU: a cache of each rank and layer, run over steps of routing.

A step's picks of a layer are one request: those that are resident hit, the others are fetched. Afterwards the cache
keeps, of what was resident and what was picked, the experts that its policy ranks highest: `lru` by the last step that
picked them, `lfu` by the number of steps that did (then the last), `predicted` by their share in the loads that the
placement was fitted to, what a log of earlier traffic tells (MoE-Infinity, arXiv:2401.14361, ranks by traced
activation). Of equals the lower slot stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.engine.routing_draws import RoutingDraws
from moesim.graph.storage import HitRates
from moesim.routing.trace import RoutingCounts, stack_profiles
from moesim.spec.overlap import ExpertCacheSpec
from moesim.spec.plan import ExpertPlacement

Floats = NDArray[np.float64]

POLICIES = ("lru", "lfu", "predicted")
# Steps that fill the cache before hits are counted, and steps that are counted.
WARM_STEPS = 16
COUNTED_STEPS = 32
# Step sizes are this factor apart.
SIZE_FACTOR = 4.0


def replay(picked: NDArray[np.bool_], capacity: int, policy: str, predicted: Floats) -> NDArray[np.bool_]:
    """Which picks of consecutive steps hit: bool, the shape of `picked` [steps, caches, slots].

    capacity: slots that stay. predicted: [caches, slots], read by `predicted` only. The cache starts full, with the
    slots that are predicted highest (`predicted`) or the first ones.
    """
    return np.asarray(_replay(picked, capacity, POLICIES.index(policy), predicted))


@njit(cache=True)
def _replay(picked: NDArray[np.bool_], capacity: int, policy: int, predicted: Floats) -> NDArray[np.bool_]:
    steps, caches, slots = picked.shape
    hits = np.zeros(picked.shape, dtype=np.bool_)
    kept = min(capacity, slots)
    for cache in range(caches):
        resident = np.zeros(slots, dtype=np.bool_)
        last = np.full(slots, -1.0)
        uses = np.zeros(slots)
        rank = predicted[cache] if policy == 2 else last
        for slot in np.argsort(-rank, kind="mergesort")[:kept]:
            resident[slot] = True
        for step in range(steps):
            for slot in range(slots):
                if picked[step, cache, slot]:
                    hits[step, cache, slot] = resident[slot]
                    resident[slot] = True
                    last[slot] = step
                    uses[slot] += 1.0
            if policy == 2:
                rank = predicted[cache]
            elif policy == 1:
                rank = uses + (last + 1.0) / (steps + 1.0)  # whole uses first, then the last one
            else:
                rank = last
            place = 0
            for slot in np.argsort(-rank, kind="mergesort"):
                if resident[slot]:
                    resident[slot] = place < kept
                    place += 1
    return hits


def hit_rates(
    cache: ExpertCacheSpec,
    placement: ExpertPlacement,
    routing: RoutingDraws,
    fitted: Sequence[RoutingCounts],
    *,
    most_tokens: float,
    seed: int,
) -> HitRates:
    """Hit rates by the number of tokens in a step, over the judged loads by their weight.

    most_tokens: of the whole instance in one step. Steps come one after the other as a load recorded them, thinned to
    the size, where it holds enough steps of enough tokens; otherwise each is drawn for itself, so that what one step
    tells of the next is only what both owe to the load. fitted: what `predicted` knows.
    """
    sizes = [1.0]
    while sizes[-1] < most_tokens:
        sizes.append(min(sizes[-1] * SIZE_FACTOR, most_tokens))
    profiles, weights = stack_profiles(fitted)
    predicted = _by_cache(placement, np.tensordot(weights, profiles, axes=1)[None])[0]
    shape = (placement.layers, placement.ranks)
    found = np.zeros((len(sizes), *shape))
    for place, tokens in enumerate(sizes):
        rates = np.zeros(shape)
        for load, weight in enumerate(routing.weights):
            rng = np.random.default_rng([seed, 9, load, place])
            picked = _by_cache(placement, _steps(routing, load, tokens, rng)) > 0
            hits = replay(picked, cache.experts_per_layer, cache.policy, predicted)
            asked = picked[WARM_STEPS:].sum(axis=(0, 2))
            rate = np.where(asked > 0, hits[WARM_STEPS:].sum(axis=(0, 2)) / np.maximum(asked, 1), 1.0)
            rates += weight * rate.reshape(shape)
        found[place] = rates
    return HitRates(np.asarray(sizes), found)


def _steps(routing: RoutingDraws, load: int, tokens: float, rng: np.random.Generator) -> Floats:
    """Counts of consecutive steps of one load: [steps, layers, experts]."""
    steps, record = WARM_STEPS + COUNTED_STEPS, routing.loads[load]
    if record.per_step and record.counts.shape[0] >= steps:
        counts = record.counts[:steps]
        routed = tokens * routing.top_k
        whole = counts.sum(axis=2)
        if (whole >= routed).all():
            return rng.binomial(np.rint(counts).astype(np.int64), (routed / whole)[..., None]).astype(np.float64)
    return routing.counts(load, np.full(steps, tokens), rng)


def _by_cache(placement: ExpertPlacement, counts: Floats) -> Floats:
    """Counts [steps, layers, experts] by the caches of layers and ranks: [steps, layers x ranks, slots of a rank]."""
    slots = placement.slot_loads(counts)
    return np.ascontiguousarray(slots.reshape(counts.shape[0], -1, placement.slots_per_rank))
