"""CPU time of price lookups, one core, compiled code warm."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from moesim.cost.ops import ExpertGemm, Gemm, MlaAttention, Operation
from moesim.cost.roofline import Roofline
from profiles.costs import StoreCosts
from profiles.store import open_profile
from tests.costs_cluster import h200

POINTS = 200_000
LOOKUPS_PER_CPU_S = 1e6
SMALL_CALL_CPU_S = 200e-6


def gemms(points: int) -> Operation:
    return Gemm(np.random.default_rng(0).uniform(1, 128, points), 7168, 2048, "fp8_block")


def decodes(points: int) -> Operation:
    batch = np.random.default_rng(0).uniform(1, 128, points)
    return MlaAttention("decode", batch, np.ones(1), batch * 10, 128, 512, 128, 64, 128, "bf16", "bf16")


def histograms(points: int) -> Operation:
    tokens = np.random.default_rng(0).poisson(30, (points, 9)).astype(np.float64)
    return ExpertGemm(tokens, 7168, 2048, 256, 8, "fp8_block", "deepep_low_latency")


@pytest.mark.parametrize("make", [gemms, decodes, histograms])
def test_lookups_per_cpu_second(
    make: Callable[[int], Operation], record_property: Callable[[str, object], None]
) -> None:
    costs = StoreCosts((open_profile("default", "h200_sxm"),), "sglang", False, Roofline(h200(nodes=4)))
    many, few = make(POINTS), make(4)
    costs.estimate(many)
    start = time.process_time()
    costs.estimate(many)
    rate = POINTS / max(time.process_time() - start, 1e-9)
    start = time.process_time()
    for _ in range(200):
        costs.estimate(few)
    small = (time.process_time() - start) / 200
    record_property("lookups_per_cpu_s", rate)
    record_property("small_call_cpu_s", small)
    print(f"{make.__name__}: {rate:.3g} lookups per CPU second, {small * 1e6:.0f} us for a small call")
    assert rate > LOOKUPS_PER_CPU_S
    assert small < SMALL_CALL_CPU_S
