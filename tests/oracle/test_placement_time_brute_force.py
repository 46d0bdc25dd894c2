"""The search on time against every placement there is, on cases small enough to list."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from moesim.spec.layer_cost import LayerCost
from moesim.spec.plan import PlacementRequest
from placement.solvers import timed
from tests.property.test_placement_time import seconds


@pytest.mark.parametrize("by_visit", [False, True])
@pytest.mark.parametrize("spare", [0, 2])
def test_the_result_is_near_the_best_of_all(by_visit: bool, spare: int) -> None:
    """6 experts on 2 ranks: every assignment of 6 or 8 slots is tried."""
    rng = np.random.default_rng(0)
    gaps = []
    for _ in range(25):
        loads = rng.lognormal(0.0, 1.0, (2, 1, 6))
        cost = LayerCost(
            tokens_per_rank=float(rng.choice([1.0, 4.0, 32.0])),
            top_k=2,
            nodes=2,
            expert_s=float(rng.choice([0.0, 1e-6, 1e-5])),
            token_s=1e-7,
            gpu_copy_s=1e-7,
            node_copy_s=1e-7 if by_visit else 0.0,
            by_visit=by_visit,
            groups=3,
            top_groups=2,
            step_scatter=0.1,
        )
        request = PlacementRequest(
            loads / loads.sum(axis=-1, keepdims=True), np.full(2, 0.5), np.arange(1), 1, 6 + spare, 2, cost=cost
        )
        found = timed.solve(request)
        doublings = cost.doublings(found, request.loads)
        each = (6 + spare) // 2
        best = np.inf
        for first, second in itertools.product(itertools.combinations(range(6), each), repeat=2):
            if set(first) | set(second) == set(range(6)):
                plan = request.placement(np.asarray([[*first, *second]]), "listed")
                best = min(best, float(seconds(replace(request, cost=cost), plan, doublings)[0]))
        reached = float(seconds(request, found, doublings)[0])
        assert reached >= best * (1 - 1e-9)
        gaps.append(reached / best - 1)
    assert np.mean(gaps) < 0.01
    assert max(gaps) < 0.05
