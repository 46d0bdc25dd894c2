"""The serving loop's decorator: functions change arrays in place, keep none, and cannot make one."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from numba.core.errors import NumbaError

from moesim.engine.batch_state import Limits, new_plan, new_ranks, new_requests
from moesim.engine.batcher import arrive, plan_step
from moesim.engine.kernel import kernel


def test_no_reference_is_kept_over_many_calls() -> None:
    requests = new_requests(np.full(9, 100), np.full(9, 5))
    ranks, plan = new_ranks(4, 6), new_plan(4, 6)
    limits = Limits(max_tokens=1000, max_running=6, kv_tokens=10_000, chunked=True, mixes=False)
    arrive(requests, ranks, 0, 0)
    assert plan_step(requests, ranks, limits, plan) == 100
    state = [*requests, *ranks[:-1], *plan]
    before = [sys.getrefcount(one) for one in state]
    for _ in range(1000):
        plan_step(requests, ranks, limits, plan)
    assert [sys.getrefcount(one) for one in state] == before


def test_a_function_that_makes_an_array_does_not_compile() -> None:
    @kernel
    def makes(values: np.ndarray) -> float:
        return float((values * 2.0).sum())

    with pytest.raises((NumbaError, RuntimeError), match="NRT"):
        makes(np.ones(3))
