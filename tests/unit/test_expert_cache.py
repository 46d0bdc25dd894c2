"""Expert caches: hits by hand, against a cache written another way, and what holds of every policy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from moesim.engine.expert_cache import COUNTED_STEPS, POLICIES, WARM_STEPS, hit_rates, replay
from moesim.engine.routing_draws import RoutingDraws
from moesim.graph.storage import PCIE_FRACTION, ExpertStorage, HitRates
from moesim.routing.dispersion import NONE
from moesim.routing.trace import RoutingCounts
from moesim.spec.overlap import ExpertCacheSpec
from moesim.spec.plan import ExpertPlacement


def picks(steps, slots):
    found = np.zeros((len(steps), 1, slots), dtype=bool)
    for step, chosen in enumerate(steps):
        found[step, 0, list(chosen)] = True
    return found


def hit_slots(found):
    return [np.flatnonzero(step[0]).tolist() for step in found]


def test_least_recently_used_by_hand():
    # Two stay, at first 0 and 1. 2 puts 1 out (of 0 and 1, both never used, the lower stays), then 1 puts 0 out.
    found = replay(picks([[0], [2], [1], [0], [1]], 3), 2, "lru", np.zeros((1, 3)))
    assert hit_slots(found) == [[0], [], [], [], [1]]


def test_least_frequently_used_by_hand():
    # 0 is picked twice and stays; 1 and 2, once each, put each other out.
    found = replay(picks([[0], [0], [2], [1], [2], [0]], 3), 2, "lfu", np.zeros((1, 3)))
    assert hit_slots(found) == [[0], [0], [], [], [], [0]]


def test_predicted_keeps_what_was_foretold():
    found = replay(picks([[0, 1, 2], [0], [2]], 3), 2, "predicted", np.array([[0.1, 0.3, 0.6]]))
    assert hit_slots(found) == [[1, 2], [], [2]]


def slow_replay(picked, capacity, policy, predicted):
    """The rule of the module's docstring with sorted lists."""
    slots = picked.shape[1]
    last, uses = [-1] * slots, [0] * slots

    def worth(slot):
        return {"lru": (last[slot],), "lfu": (uses[slot], last[slot]), "predicted": (predicted[slot],)}[policy]

    def best(candidates):
        return sorted(candidates, key=lambda slot: (*(-value for value in worth(slot)), slot))[:capacity]

    kept, hits = best(range(slots)), []
    for step, row in enumerate(picked):
        asked = [slot for slot in range(slots) if row[slot]]
        hits.append([slot in kept and bool(row[slot]) for slot in range(slots)])
        for slot in asked:
            last[slot], uses[slot] = step, uses[slot] + 1
        kept = best(set(kept) | set(asked))
    return np.array(hits)


@pytest.mark.parametrize("policy", POLICIES)
def test_replay_is_what_sorting_gives(policy):
    for seed in range(60):
        rng = np.random.default_rng(seed)
        slots, caches = int(rng.integers(1, 9)), int(rng.integers(1, 4))
        picked = rng.random((int(rng.integers(1, 30)), caches, slots)) < rng.random()
        predicted, capacity = rng.random((caches, slots)), int(rng.integers(1, slots + 2))
        found = replay(picked, capacity, policy, predicted)
        for cache in range(caches):
            wanted = slow_replay(picked[:, cache], capacity, policy, predicted[cache])
            np.testing.assert_array_equal(found[:, cache], wanted)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_larger_cache_never_hits_less_and_a_whole_one_always(policy):
    rng = np.random.default_rng(0)
    picked, predicted = rng.random((40, 3, 12)) < 0.3, rng.random((3, 12))
    hits = [replay(picked, capacity, policy, predicted) for capacity in range(1, 13)]
    for smaller, larger in pairwise(hits):
        assert (larger | ~smaller).all()  # whatever hits in the smaller hits in the larger
    np.testing.assert_array_equal(hits[-1], picked)


def rates(policy, capacity, *, loads=None, tokens=64.0):
    profile = np.tile(np.array([8.0, 4, 2, 1, 1, 1, 1, 1]), (2, 1))
    loads = loads or [RoutingCounts(profile[None] * 1000, np.arange(2), 2, "load")]
    placement = ExpertPlacement(np.tile(np.arange(8), (2, 1)), np.arange(2), 8, 2, 2)
    routing = RoutingDraws(loads, 1, NONE)
    spec = ExpertCacheSpec(experts_per_layer=capacity, policy=policy)
    return hit_rates(spec, placement, routing, loads, most_tokens=tokens, seed=0)


def test_one_token_hits_with_the_share_of_what_stays():
    found = rates("predicted", 2, tokens=1.0)
    assert found.hits.shape == (1, 2, 2)
    # Rank 0 keeps experts 0 and 1 of 0 to 3: 12 of 15 of its picks. 32 steps, of which 15 of 19 go to rank 0.
    assert found.hits[0, :, 0].mean() == pytest.approx(12 / 15, abs=0.15)


def test_many_tokens_pick_everything():
    found = rates("lru", 3, tokens=4096.0)
    np.testing.assert_allclose(found.hits[-1], 3 / 4, atol=0.02)
    assert found.tokens.tolist() == [1, 4, 16, 64, 256, 1024, 4096]


def test_recorded_steps_are_replayed_in_their_order():
    # Expert 0 for as long as the cache warms up, then 0 and 1 in turn: never two steps alike, so that one slot of
    # least recently used never hits. Draws from the same load would pick 0 twice in a row.
    counts = np.zeros((WARM_STEPS + COUNTED_STEPS, 2, 8))
    counts[:, :, 0] = 1
    turn = np.arange(WARM_STEPS, WARM_STEPS + COUNTED_STEPS)
    counts[turn[::2], :, 0], counts[turn[::2], :, 1] = 0, 1
    load = RoutingCounts(counts, np.arange(2), 2, "recorded", per_step=True)
    assert rates("lru", 1, loads=[load], tokens=1.0).hits[0, :, 0].tolist() == [0.0, 0.0]
    drawn = RoutingCounts(counts, np.arange(2), 2, "summed")
    assert rates("lru", 1, loads=[drawn], tokens=1.0).hits[0, :, 0].min() > 0.2


def test_hit_rates_between_sizes():
    found = HitRates(np.array([1.0, 4.0]), np.array([[[0.0]], [[1.0]]])).at(np.array([0.5, 1.0, 2.0, 4.0, 99.0]))
    np.testing.assert_allclose(found.ravel(), [0.0, 0.0, 0.5, 1.0, 1.0])
    one = HitRates(np.array([1.0]), np.array([[[0.25]]])).at(np.array([1.0, 7.0]))
    assert one.ravel().tolist() == [0.25, 0.25]


def test_what_is_fetched():
    tokens = np.array([[[[3.0, 0.0, 0.5], [0.0, 0.0, 0.0]]]])  # one step, one layer, two ranks of three slots
    per_expert = 2.0 / PCIE_FRACTION / 10.0
    hits = HitRates(np.array([1.0]), np.full((1, 1, 2), 0.8))
    whole = ExpertStorage("offload", 2.0, 10.0).fetch(tokens, np.array([4.0]))
    picked = ExpertStorage("pregated", 2.0, 10.0).fetch(tokens, np.array([4.0]))
    missed = ExpertStorage("cached", 2.0, 10.0, hits=hits).fetch(tokens, np.array([4.0]))
    np.testing.assert_allclose(whole.seconds, [[[3 * per_expert, 3 * per_expert]]])
    np.testing.assert_allclose(picked.seconds, [[[1.5 * per_expert, 0.0]]])
    np.testing.assert_allclose(missed.seconds, [[[0.3 * per_expert, 0.0]]])
