"""CPU time of counting pairs in a trace of DeepSeek-V3's shape, and of placing by them (a quarter of the layers).

With MOESIM_WHOLE (`make bench`) all layers are placed.
"""

from __future__ import annotations

import os
import time

import numpy as np

from moesim.routing.picks import TokenPicks
from moesim.routing.planted import planted_trace
from moesim.spec.plan import PlacementRequest
from placement.problem import request_from_loads, solve

LAYERS, EXPERTS, TOP_K = 58, 256, 8
PLACED = LAYERS if os.environ.get("MOESIM_WHOLE") else 15


def test_counting_a_million_tokens_takes_seconds() -> None:
    tokens = 40_000
    rng = np.random.default_rng(0)
    start = rng.integers(0, EXPERTS, (tokens, LAYERS, 1))
    ids = ((start + 37 * np.arange(TOP_K)) % EXPERTS).astype(np.int16)
    picks = TokenPicks(ids, np.zeros(tokens, dtype=np.int64), follows=True)
    small = TokenPicks(ids[:8], np.zeros(8, dtype=np.int64), follows=True)
    small.coactivation(EXPERTS), small.transitions(EXPERTS)  # compile
    spent = {}
    for name in ("coactivation", "transitions"):
        begin = time.process_time()
        getattr(picks, name)(EXPERTS)
        spent[name] = (time.process_time() - begin) * 1e6 / tokens
    print(
        f"\na million tokens x {LAYERS} layers: {spent['coactivation']:.1f} s together, {spent['transitions']:.1f} s on"
    )
    assert sum(spent.values()) < 60.0


def test_affinity_places_deepseek_v3_in_seconds() -> None:
    load, _ = planted_trace(
        tokens=10_000, layers=4, experts=EXPERTS, top_k=TOP_K, communities=8, inside=0.5, follow=0.7,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    few = request_from_loads([load], slots=288, ranks=32, nodes=4)
    assert few.coactivation is not None and few.dispersion is not None
    layer = np.arange(PLACED) % 4
    request = PlacementRequest(
        few.loads[:, layer], few.weights, np.arange(PLACED), PLACED, slots=288, ranks=32, nodes=4,
        coactivation=few.coactivation[layer], dispersion=few.dispersion[layer],
    )  # fmt: skip
    solved = solve(request, "affinity")
    print(f"\naffinity, {PLACED} x {EXPERTS}, 288 slots, 32 GPUs on 4 nodes: {solved.solve_cpu_s:.2f} s")
    assert solved.placement.notes["layers_left_as_greedy"] == 0
    assert solved.solve_cpu_s < 20.0 * PLACED / LAYERS
