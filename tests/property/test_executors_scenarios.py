"""The two executors against each other on steps of random scenarios: real models, plans, policies and routing."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.engine import des, maxplus
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.stepmodel import ExactModel, StepModel
from moesim.errors import Infeasible
from moesim.graph.batch import step_batch
from moesim.spec.scenario import Scenario

SCENARIOS = 200
BLOCKS = 10
MODELS = (
    "allenai/OLMoE-1B-7B-0924",
    "openai/gpt-oss-120b",
    "Qwen/Qwen3-30B-A3B",
    "mistralai/Mixtral-8x7B-v0.1",
    "deepseek-ai/DeepSeek-V3",
)


def drawn(rng):
    """A scenario, legal or not."""
    gpus = int(rng.choice([4, 8, 16]))
    tp = int(rng.choice([1, 1, 2, 4]))
    backend = str(rng.choice(["deepep", "alltoall", "allgather_reducescatter", "allreduce"]))
    attention_dp = 1 if backend == "allreduce" else max(1, gpus // tp)
    pp = int(rng.choice([1, 1, 2]))
    model = str(rng.choice(MODELS))
    split = tp if model == "deepseek-ai/DeepSeek-V3" else 1
    return {
        "model": model,
        "cluster": {"system": "h200_sxm", "nodes": max(1, gpus // 8) * pp, "gpus_per_node": min(gpus, 8)},
        "cost": {"source": "roofline"},
        "routing": {"synthetic": {"kind": "zipf", "exponent": float(rng.uniform(0, 1)), "workloads": 2}},
        "parallel": {"tp": tp, "attention_dp": attention_dp, "ep": tp * attention_dp, "pp": pp, "decode_cp": split},
        "placement": {"solver": "contiguous"},
        "policies": {
            "dispatch": {"backend": backend},
            "schedule": str(rng.choice(["sequential", "two_batch"])),
        },
        "serving": {
            "workload": {"isl": 512, "osl": 64, "requests": 10, "arrivals": {"concurrency": 8}},
            "batching": {
                "max_running_requests_per_dp_rank": 64,
                "max_batch_tokens_per_dp_rank": 2048,
            },
        },
    }


def graph_of(rng):
    """The graph of a random step of a random scenario that can run."""
    while True:
        try:
            scenario = Scenario.read(drawn(rng), where="drawn")
            deployment = resolve(groundwork(scenario))
        except Infeasible:
            continue
        exact = ExactModel(StepModel(deployment, seed=int(rng.integers(2**31))), "maxplus")
        ranks = deployment.setup.parallel.attention_dp
        if rng.random() < 0.5:
            batch = step_batch(
                ranks=ranks, decode_seqs=rng.integers(2, 60, (1, ranks)), decode_kv=rng.uniform(100, 2000, (1, ranks))
            )
            return exact.build(batch, "decode")[0]
        batch = step_batch(ranks=ranks, prefill_seqs=2.0, prefill_new=rng.integers(10, 1000, (1, ranks)))
        return exact.build(batch, "prefill")[0]


@pytest.mark.slow
@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_scenarios(block):
    for seed in range(block * SCENARIOS // BLOCKS, (block + 1) * SCENARIOS // BLOCKS):
        graph = graph_of(np.random.default_rng([5, seed]))
        fast, careful = maxplus.run(graph), des.run(graph)
        np.testing.assert_allclose(careful.step_s, fast.step_s, rtol=1e-9)
        np.testing.assert_allclose(careful.rank_end_s, fast.rank_end_s, rtol=1e-9)
        for operation, seconds in fast.busy_s.items():
            np.testing.assert_allclose(careful.busy_s[operation], seconds, rtol=1e-9)
        np.testing.assert_allclose(careful.compute_busy_s, fast.compute_busy_s, rtol=1e-9)
        np.testing.assert_allclose(careful.wait_s, fast.wait_s, rtol=1e-9, atol=1e-9 * float(fast.step_s.max()))
