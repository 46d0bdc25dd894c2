"""CPU time of drawing counts and pricing their traffic, DeepSeek-V3 on 32 ranks; budgets as in the design.

The gates allow SLACK times the budget: they catch an algorithm that went wrong, never a slow machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from moesim.network.traffic import equivalent_tokens
from moesim.routing.sample import RoutingSampler, prepare
from moesim.routing.synth import deepseek_like
from moesim.spec.plan import ExpertPlacement

pytestmark = pytest.mark.benchmark(timer=time.process_time)

SLACK = 4.0
STEPS, LAYERS, EXPERTS, TOP_K, RANKS = 1000, 58, 256, 8, 32


@pytest.fixture(scope="module")
def sampler() -> RoutingSampler:
    rng = np.random.default_rng(0)
    profile = deepseek_like(["decode"], layers=LAYERS, experts=EXPERTS, groups=8, rng=rng)[0]
    ready = prepare(profile, TOP_K)
    ready.counts([10, 100], rng)  # compile
    return ready


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


@pytest.mark.parametrize("per_rank", [8, 32, 128, 512])
def test_counts_of_a_thousand_steps(sampler: RoutingSampler, per_rank: int) -> None:
    rng = np.random.default_rng(1)
    took = cpu_seconds(lambda: sampler.counts(np.full(STEPS, per_rank * RANKS), rng))
    print(f"counts of {STEPS} steps at {per_rank} tokens per rank: {took:.3f} s CPU (budget 0.5)")
    assert took < 0.5 * SLACK


def test_ids_of_4096_tokens(sampler: RoutingSampler) -> None:
    rng = np.random.default_rng(1)
    took = min(cpu_seconds(lambda: sampler.ids(0, 4096, rng)) for _ in range(5))
    print(f"top-8-of-256 ids of 4,096 tokens: {took * 1e3:.2f} ms CPU (alias with rejection: 0.71)")
    assert took < 0.71e-3 * SLACK


@pytest.mark.parametrize("mode", ["normal", "low_latency"])
def test_traffic_of_a_thousand_steps(sampler: RoutingSampler, mode: str) -> None:
    rng = np.random.default_rng(1)
    plan = ExpertPlacement(np.tile(np.arange(EXPERTS), (LAYERS, 1)), np.arange(LAYERS), EXPERTS, RANKS, LAYERS)
    counts = sampler.counts(np.full(STEPS, 128 * RANKS), rng)
    loads = plan.rank_loads(counts)
    tokens = np.full((STEPS, RANKS), 128.0)

    def work() -> object:
        return equivalent_tokens(
            mode="normal" if mode == "normal" else "low_latency",
            tokens=tokens,
            rank_loads=loads,
            placement=plan,
            counts=counts,
            top_k=TOP_K,
            groups=8,
            top_groups=4,
            nodes=4,
        )

    work()
    took = cpu_seconds(work)
    print(f"{mode} traffic of {STEPS} steps: {took:.3f} s CPU")
    assert took < 0.15 * SLACK
