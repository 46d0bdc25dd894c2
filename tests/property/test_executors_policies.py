"""Both executors on 1,000 random steps of every schedule, dispatch backend and storage that go together."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any, get_args

import numpy as np
import pytest

from moesim.engine import des, maxplus
from moesim.engine.deployment import Groundwork, groundwork, resolve
from moesim.engine.stepmodel import ExactModel, StepModel
from moesim.errors import BadInput, Infeasible, OutsideProfile
from moesim.graph.batch import step_batch
from moesim.graph.moe_layer import LAYERS
from moesim.graph.task import TaskGraph
from moesim.spec.overlap import Storage
from moesim.spec.scenario import DispatchSpec, Scenario
from tests.property.test_executors_agree import assert_same

CASES = 1000
BLOCKS = 10
BACKENDS = get_args(DispatchSpec.model_fields["backend"].annotation)
STORAGES = get_args(Storage)
NAMES = (*sorted(LAYERS), *BACKENDS, *STORAGES)  # each is wanted in turn, all else is drawn
# DeepSeek-V3's shape with few layers: one dense, three MoE layers of 16 experts in 4 groups and a shared expert.
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_hidden_layers": 4,
    "hidden_size": 1024, "vocab_size": 4096, "intermediate_size": 2048, "num_attention_heads": 16,
    "num_key_value_heads": 16, "q_lora_rank": 256, "kv_lora_rank": 128, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 16, "num_experts_per_tok": 4,
    "moe_intermediate_size": 512, "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "n_group": 4, "topk_group": 2, "scoring_func": "sigmoid",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def drawn(rng: np.random.Generator, model: str, wanted: str = "") -> dict[str, Any]:
    """A scenario, legal or not; wanted: a schedule, backend or storage that it has."""

    def choice(names: Sequence[str]) -> str:
        found = str(rng.choice(names))
        return wanted if wanted in names else found

    gpus, tp, backend = int(rng.choice([4, 4, 8, 16])), int(rng.choice([1, 1, 2])), choice(BACKENDS)
    dp = 1 if backend == "allreduce" else gpus // tp
    tp = gpus if backend == "allreduce" else tp
    split = int(rng.choice([1, 1, 2])) if backend in ("allreduce", "allgather_reducescatter") else 1
    schedule, storage = choice(sorted(LAYERS)), choice(STORAGES)
    mode = str(rng.choice(["auto", "normal", "low_latency"]))
    slowdown: Any = {"compute": float(rng.uniform(1, 1.5)), "communication": float(rng.uniform(1, 1.5))}
    overlap: dict[str, Any] = {"slowdown": [slowdown, "none", "none", "multiprocessors"][rng.integers(4)]}
    if schedule == "pipeline":
        overlap["chunks"] = [2, 3, 4, "auto"][rng.integers(4)]
    policies: dict[str, Any] = {
        "dispatch": {"backend": backend, "mode": mode, "replica": str(rng.choice(["local_first", "equal"]))},
        "schedule": schedule,
        "overlap": overlap,
        "storage": storage,
    }
    if storage == "cached":
        policies["expert_cache"] = {
            "experts_per_layer": int(rng.integers(1, 5)),
            "policy": str(rng.choice(["lru", "lfu", "predicted"])),
        }
    most = 128 if mode == "low_latency" else 2048
    return {
        "model": model,
        "cluster": {"system": "h200_sxm", "nodes": max(1, gpus // 8), "gpus_per_node": min(gpus, 8)},
        "engine": {"name": "vllm" if schedule == "whole_graph" else str(rng.choice(["sglang", "vllm"]))},
        "cost": {"source": "roofline"},
        "routing": {"synthetic": {"kind": "zipf", "exponent": 0.8, "workloads": 2}},
        "parallel": {"tp": tp, "attention_dp": dp, "ep": tp * dp // split, "expert_tp": split},
        "placement": {"solver": "contiguous", "redundant_experts": 0 if rng.random() < 0.7 else 16},
        "policies": policies,
        "serving": {
            "workload": {"isl": 512, "osl": 64, "requests": 10, "arrivals": {"concurrency": 8}},
            "batching": {"max_running_requests_per_dp_rank": 64, "max_batch_tokens_per_dp_rank": most},
        },
    }


@cache
def ground_of(model: str, cluster: str) -> Groundwork:
    data = drawn(np.random.default_rng(0), model) | {"cluster": json.loads(cluster), "policies": {}}
    return groundwork(Scenario.read(data, where="drawn"))


def case(rng: np.random.Generator, model: str, wanted: str) -> tuple[Scenario, TaskGraph]:
    """The graph of a random step of a random plan that can run and has what is wanted."""
    while True:
        data = drawn(rng, model, wanted)
        scenario = Scenario.read(data, where="drawn")
        try:
            deployment = resolve(ground_of(model, json.dumps(data["cluster"])), scenario)
            exact = ExactModel(StepModel(deployment, seed=int(rng.integers(2**31))), "maxplus")
        except (Infeasible, OutsideProfile, BadInput):
            continue
        ranks = deployment.setup.parallel.attention_dp
        if rng.random() < 0.5:
            batch = step_batch(ranks=ranks, decode_seqs=rng.integers(2, 60, (1, ranks)), decode_kv=500.0)
            return scenario, exact.build(batch, "decode")[0]
        batch = step_batch(ranks=ranks, prefill_seqs=2.0, prefill_new=rng.integers(10, 60, (1, ranks)))
        return scenario, exact.build(batch, "prefill")[0]


@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_policies(block: int, model: str) -> None:
    """Without contention the same to 1e-9; with it nothing ends earlier."""
    seen: Counter[str] = Counter()
    for seed in range(block * CASES // BLOCKS, (block + 1) * CASES // BLOCKS):
        scenario, graph = case(np.random.default_rng([6, seed]), model, NAMES[seed % len(NAMES)])
        policies = scenario.policies
        seen.update((policies.schedule, policies.dispatch.backend, policies.storage))
        fast = maxplus.run(graph, timeline=True)
        assert_same(fast, des.run(graph, sharing=False))
        if policies.storage == "resident":  # one stream uses the links: nothing to contend with
            assert_same(fast, des.run(graph))
            continue
        shared = des.run(graph, timeline=True)
        assert fast.end_s is not None and shared.end_s is not None
        assert (shared.end_s >= fast.end_s * (1 - 1e-9)).all()
        seen["contended"] += bool(shared.step_s[0] > fast.step_s[0] * (1 + 1e-6))
    assert set(seen) == {*NAMES, "contended"}
