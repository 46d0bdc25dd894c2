"""Pipelines that choose, whole graphs, storages and slowdowns, from the scenario to the step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli import run
from moesim.engine import maxplus
from moesim.engine.batcher import new_plan
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.step_graph import best_step, options, step_seconds
from moesim.engine.stepmodel import ExactModel, StepModel
from moesim.graph.batch import StepBatch, step_batch
from moesim.graph.layer import build_step
from moesim.graph.plan_pricer import CHOICES, PlanPricer
from moesim.graph.priced_step import PricedStep
from moesim.spec.scenario import load_scenario
from tests.scenarios import small, write

NO_REPLICAS = {"placement": {"solver": "contiguous"}}
DEEPSEEK = {
    "model": "deepseek-ai/DeepSeek-V3",
    "precision": {"dense": "fp8_block", "experts": "fp8_block"},
    "cluster": {"system": "h200_sxm", "nodes": 2, "gpus_per_node": 8},
    "parallel": {"attention_dp": 16, "ep": 16},
    "placement": {"solver": "contiguous"},
}


def step_model(folder: Path, policies: dict[str, Any], **changes: Any) -> StepModel:
    return StepModel(resolve(groundwork(load_scenario(write(folder, small(policies=policies, **changes))))), seed=0)


def prefill(ranks: int, tokens: float = 2000.0) -> StepBatch:
    return step_batch(ranks=ranks, prefill_seqs=1.0, prefill_new=np.array([[tokens] * ranks, [tokens / 50] * ranks]))


def priced(model: StepModel, batch: StepBatch, mode: str = "normal") -> PricedStep:
    moe = model.deployment.setup.model.moe
    share = batch.tokens.sum(axis=1) * moe.top_k / moe.experts
    counts = np.broadcast_to(share[:, None, None], (batch.steps, len(moe.layer_ids), moe.experts))
    return PlanPricer(model.deployment.setup, model.deployment.ground.costs).price(
        batch, counts, mode=mode, graphed=False
    )


def test_chunks_share_the_tokens_and_pay_for_being_small(tmp_path: Path) -> None:
    two = {"schedule": "pipeline", "overlap": {"chunks": 2}}
    whole = priced(step_model(tmp_path, {}), prefill(8))
    halves = priced(step_model(tmp_path, two), prefill(8))
    assert (whole.chunks, halves.chunks, halves.others) == (1, 2, ())
    for name in ("dispatch", "experts", "combine"):
        once, each = getattr(whole, name).seconds(), getattr(halves, name).seconds()
        assert (each < once).all()
        assert (2 * each >= once * (1 - 1e-9)).all()
    np.testing.assert_array_equal(whole.attention.seconds(), halves.attention.seconds())


def test_an_adaptive_pipeline_is_the_best_of_its_choices_at_each_step(tmp_path: Path) -> None:
    adaptive = step_model(tmp_path, {"schedule": "pipeline"}, **DEEPSEEK)
    setup = adaptive.deployment.setup
    step = priced(adaptive, prefill(16, 8000.0))
    assert [one[0].chunks for one in options([step])] == list(CHOICES)
    each = np.array([maxplus.run(build_step(setup, one)).step_s for one in options([step])])
    np.testing.assert_array_equal(step_seconds(setup, [step]), each.min(axis=0))
    best = each.argmin(axis=0)
    assert best[0] > 0  # 8,000 tokens a rank are worth cutting
    assert best[1] < best[0]  # 160 are not, or less so
    graph, chosen = best_step(setup, [step])
    assert chosen[0].chunks == CHOICES[int(each.mean(axis=1).argmin())]
    assert sum(task.name == "dispatch" and task.layer == 5 for task in graph.tasks) == chosen[0].chunks


def test_low_latency_buffers_end_the_choices(tmp_path: Path) -> None:
    model = step_model(tmp_path, {"schedule": "pipeline"})
    step = priced(model, step_batch(ranks=8, decode_seqs=64.0, decode_kv=100.0), mode="low_latency")
    assert [one[0].chunks for one in options([step])] == [1, 2]


@pytest.mark.parametrize(
    "policies",
    [
        {"schedule": "pipeline", "overlap": {"chunks": 2}},
        {"schedule": "pipeline"},
        {"schedule": "shortcut"},
        {"schedule": "whole_graph", "dispatch": {"backend": "alltoall"}},
        {"schedule": "pipeline", "overlap": {"slowdown": {"compute": 1.3, "communication": 1.2}}},
        {"storage": "offload"},
        {"storage": "pregated"},
        {"storage": "cached", "expert_cache": {"experts_per_layer": 4}},
    ],
)
@pytest.mark.parametrize("reads", [False, True])
def test_the_table_agrees_with_the_step_itself(tmp_path: Path, policies: dict[str, Any], reads: bool) -> None:
    engine = {"engine": {"name": "vllm"}} if policies.get("schedule") == "whole_graph" else {}
    model = step_model(tmp_path, policies, **NO_REPLICAS, **engine)
    plan = new_plan(8, model.limits.max_running)
    if reads:
        plan.prefill_seqs[:], plan.prefill_tokens[:] = 1, 400
    else:
        plan.decode_seqs[:], plan.decode_kv[:] = 32, 32 * 200
    exact = ExactModel(model, "maxplus")
    mean = np.mean([exact(plan) for _ in range(8)])
    assert model.base(plan) == pytest.approx(mean, rel=0.05)


def test_a_whole_graph_takes_prompts_in(tmp_path: Path) -> None:
    vllm, alltoall = {"engine": {"name": "vllm"}}, {"dispatch": {"backend": "alltoall"}}
    eager = step_model(tmp_path, alltoall, **vllm)
    whole = step_model(tmp_path, {"schedule": "whole_graph", **alltoall}, **vllm)
    layers = eager.deployment.setup.model.layers * eager.deployment.rules.eager_layer_s
    plan = new_plan(8, eager.limits.max_running)
    plan.prefill_seqs[:], plan.prefill_tokens[:] = 1, 512
    for make in (lambda model: model.base, lambda model: ExactModel(model, "maxplus")):
        assert make(eager)(plan) - make(whole)(plan) == pytest.approx(layers, rel=0.05)
        plan.prefill_tokens[:] = 600  # beyond the largest captured size
        assert make(whole)(plan) == pytest.approx(make(eager)(plan), rel=0.01)
        plan.prefill_tokens[:] = 512
    # DeepEP's normal kernels wait for the host: prompts run eagerly, decode in its graphs as ever.
    deepep = step_model(tmp_path, {"schedule": "whole_graph"}, **vllm)
    assert not deepep.captures_prompts
    assert deepep.graphs.sizes == eager.graphs.sizes


def test_a_larger_cache_is_faster_and_a_whole_one_as_fast_as_resident(tmp_path: Path) -> None:
    plan_of = {}
    for kept in (2, 6, 8):
        cached = {"storage": "cached", "expert_cache": {"experts_per_layer": kept}}
        plan_of[kept] = step_model(tmp_path, cached, **NO_REPLICAS)
    plan_of[99] = step_model(tmp_path, {}, **NO_REPLICAS)
    batch = step_batch(ranks=8, decode_seqs=16.0, decode_kv=100.0)
    seconds = [float(ExactModel(model, "maxplus").run(batch, "decode")[1].step_s[0]) for model in plan_of.values()]
    assert seconds[0] > 1.2 * seconds[1] > 1.2 * seconds[2]
    assert seconds[2] == pytest.approx(seconds[3], rel=1e-9)


def test_simulate_tells_what_storage_and_overlap_rest_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policies = {
        "storage": "cached",
        "expert_cache": {"experts_per_layer": 4, "policy": "lfu"},
        "schedule": "shortcut",
        "overlap": {"slowdown": "multiprocessors"},
    }
    path = write(tmp_path, small(policies=policies, **NO_REPLICAS))
    assert run(["simulate", str(path), "--json", "--draws", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["step"]["by_operation_s"]["expert_fetch"] > 0
    assert told["memory"]["ledger"]["expert_staging"] > 0
    storage, overlap = told["plan"]["storage"], told["plan"]["overlap"]
    assert storage["kind"] == "cached"
    assert 0.4 < storage["hit_rate"][-1]["mean"] < 0.6  # half of the experts stay, and all are picked
    assert overlap["normal"]["compute"] == pytest.approx(132 / 112)
    assert overlap["normal"]["tag"] == "formula"
    assert told["provenance"]["formula"] > 0.5
    low, high = (told["intervals"]["tpot_s.p50"][end] for end in ("low", "high"))
    assert low < high
    plain = write(tmp_path, small(), "plain.yaml")
    assert run(["simulate", str(plain), "--json", "--draws", "0"]) == 0
    assert not {"storage", "overlap"} & set(json.loads(capsys.readouterr().out)["plan"])


def test_a_refused_combination_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, small(policies={"schedule": "two_batch", "storage": "offload"}))
    assert run(["simulate", str(path), "--json"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert "policies.storage" in told.err
