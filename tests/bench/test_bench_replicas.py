"""CPU time of replica choices that look at each batch: DeepSeek-V3's experts, a solved placement, real skew."""

from __future__ import annotations

import time

import numpy as np
import pytest

from moesim.network.choice import SOLVE_S_PER_SLOT, prepare
from moesim.spec.plan import PlacementRequest
from placement.solvers.greedy import solve

pytestmark = pytest.mark.benchmark(timer=time.process_time)

SLACK = 4.0
LAYERS, EXPERTS, RANKS, TOKENS, STEPS = 58, 256, 32, 4096, 20


@pytest.mark.parametrize("slots", [288, 384])
@pytest.mark.parametrize("name", sorted(SOLVE_S_PER_SLOT))
def test_choice_of_one_layer(benchmark, name, slots):
    """The placement is fitted to other loads than it meets, so that there is something to balance."""
    rng = np.random.default_rng(0)
    profile = rng.lognormal(0.0, 0.7, (LAYERS, EXPERTS))
    fitted = (profile / profile.sum(axis=-1, keepdims=True))[None]
    layers = np.arange(LAYERS, dtype=np.int64)
    plan = solve(PlacementRequest(fitted, np.ones(1), layers, LAYERS, slots, RANKS, nodes=4))
    met = profile * rng.lognormal(0.0, 0.4, profile.shape)
    counts = rng.multinomial(TOKENS * 8, met / met.sum(axis=-1, keepdims=True), size=(STEPS, LAYERS)).astype(float)
    replicas = prepare(plan, policy=name, nodes=4)
    equal = prepare(plan, policy="equal", nodes=4).rank_loads(counts)
    found = replicas.rank_loads(counts)  # compiled code is warm after this
    started = time.process_time()
    benchmark.pedantic(lambda: replicas.slot_loads(counts), rounds=1)
    each = (time.process_time() - started) / (STEPS * LAYERS)
    benchmark.extra_info["layer_s"] = each
    hot, hot_equal = ((one.max(-1) / one.mean(-1)).mean() for one in (found, equal))
    print(f"\n{name}, {slots} slots: {each * 1e6:.1f} us a layer, {each / slots * 1e9:.0f} ns a slot; "
          f"max/mean {hot:.3f}, equal split {hot_equal:.3f}")  # fmt: skip
    assert each < SOLVE_S_PER_SLOT[name] * slots * SLACK
