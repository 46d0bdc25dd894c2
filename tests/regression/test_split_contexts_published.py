"""Split contexts against what others measured: memory by size, time by direction, on hardware that is not ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesim.engine.batcher import new_plan
from moesim.engine.deployment import Deployment, groundwork, resolve
from moesim.engine.stepmodel import StepModel
from moesim.spec.scenario import load_scenario
from tests.scenarios import small, write

CONTEXTS = (32768, 65536, 131072, 262144)
CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)


def deployment(folder: Path, parts: int) -> Deployment:
    data = small(
        model="deepseek-ai/DeepSeek-V3",
        cluster={"system": "b200_sxm", "nodes": 1, "gpus_per_node": 8},
        precision={"dense": "fp8_block", "experts": "fp8_block"},
        parallel={"tp": 8, "ep": 1, "expert_tp": 8, "decode_cp": parts},
        policies={"dispatch": {"backend": "allreduce"}},
        placement={"solver": "contiguous"},
        routing={"synthetic": {"kind": "deepseek_like", "workloads": 2}},
    )
    data["serving"]["workload"] |= {"isl": CONTEXTS[-1], "osl": 1}
    return resolve(groundwork(load_scenario(write(folder, data))))


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Deployment]:
    folder = tmp_path_factory.mktemp("scenarios")
    return {parts: deployment(folder, parts) for parts in (1, 2, 4, 8)}


def test_the_cache_holds_as_many_times_the_tokens_as_measured(plans: dict[int, Deployment]) -> None:
    """ai-dynamo/aisimulate, pull request 240: vLLM on 8 B200, TP 8; the model is not told, so not the size itself."""
    tokens = {parts: one.memory.kv_capacity_tokens for parts, one in plans.items()}
    for parts, measured in ((2, 1.98), (4, 3.96), (8, 7.85)):
        assert tokens[parts] / tokens[1] == pytest.approx(measured, rel=0.015)


def test_splitting_pays_from_fewer_requests_on_the_longer_the_contexts(plans: dict[int, Deployment]) -> None:
    """sgl-project/sglang, pull request 33926 (an sm100 GPU, TP 8, a group of 8): where the two curves cross.

    Between 8 and 16 requests at 32K, 4 and 8 at 64K, 2 and 4 at 128K, below 1 at 256K. By formula they cross an octave
    earlier at most, and at the same place in 256K.
    """
    models = {parts: StepModel(plans[parts], seed=0) for parts in (1, 8)}
    pays: list[int] = []
    for context in CONTEXTS:
        faster = []
        for seqs in CONCURRENCY:
            plan = new_plan(1, 64)
            plan.decode_seqs[:], plan.decode_kv[:] = seqs, float(seqs * context)
            faster.append(models[8].base(plan) < models[1].base(plan))
        assert faster == sorted(faster)  # once it pays, it pays for more requests too
        pays.append(CONCURRENCY[faster.index(True)])
    for found, published in zip(pays, (16, 8, 4, 1), strict=True):
        assert published / 2 <= found <= published
