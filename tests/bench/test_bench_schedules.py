"""CPU time of 1,000 DeepSeek-V3-sized steps under every schedule and storage, and of one step in `des`; the budgets are
those of the design, the gates allow four times as much (see test_bench_executors)."""

from __future__ import annotations

import time

import numpy as np
import pytest

from moesim.engine import des, maxplus
from moesim.graph.layer import build_step
from moesim.graph.priced_step import Part, PricedStep
from moesim.graph.storage import ExpertStorage
from moesim.graph.task import TaskGraph
from tests.bench.test_bench_executors import LAYERS, RANKS, gate
from tests.priced_steps import by_hand, one_price, part, setup

pytestmark = pytest.mark.benchmark(timer=time.process_time)

CASES = [
    ("sequential", ""), ("two_batch", ""), ("pipeline", ""), ("shared_overlap", ""), ("shortcut", ""),
    ("sequential", "offload"), ("shortcut", "cached"),
]  # fmt: skip
CHUNKS = 4


def graph_of(schedule: str, storage: str, steps: int) -> TaskGraph:
    """Random durations by rank where a real step has them; a pipeline of four chunks."""
    rng = np.random.default_rng(0)
    stored = ExpertStorage(storage, 1.0, 1.0, 0.8) if storage else None
    one = setup(LAYERS, {"schedule": schedule}, ranks=RANKS, nodes=4, storage=stored)

    def drawn(*shape: int) -> np.ndarray:
        return rng.exponential(5e-5, shape)

    priced: PricedStep = by_hand(
        projections=part(drawn(steps, RANKS)),
        attention=part(drawn(steps, RANKS)),
        gate=part(drawn(steps, RANKS)),
        shared=Part((one_price(3e-5), one_price(1e-5, "memory_bound"), one_price(2e-5))),
        dispatch=part(drawn(steps, LAYERS, 1)),
        experts=part(drawn(steps, LAYERS, RANKS)),
        combine=part(drawn(steps, LAYERS, 1)),
        fetch=part(drawn(steps, LAYERS, RANKS)),
        steps=steps,
        ranks=RANKS,
        chunks=CHUNKS if schedule == "pipeline" else 1,
    )
    return build_step(one, [priced, priced] if schedule == "two_batch" else [priced])


@pytest.mark.parametrize(("schedule", "storage"), CASES)
def test_thousand_steps(benchmark, schedule, storage):
    graph = graph_of(schedule, storage, 1000)
    name = f"maxplus, 1,000 steps of {len(graph.tasks)} tasks, {schedule} {storage or 'resident'}"
    gate(benchmark, name, lambda: maxplus.run(graph), 0.3)


@pytest.mark.parametrize(("schedule", "storage", "budget_s"), [("pipeline", "", 0.1), ("shortcut", "cached", 2.0)])
def test_one_careful_step(benchmark, schedule, storage, budget_s):
    graph = graph_of(schedule, storage, 1)
    shared = bool(storage)  # copies from the host meet the NIC's transfers on the GPU's PCIe link
    assert (des.run(graph).step_s[0] > maxplus.run(graph).step_s[0] * 1.001) == shared
    gate(benchmark, f"des, one step, {schedule} {storage or 'resident'}", lambda: des.run(graph), budget_s)
