"""The table against the executors where ranks are idle, batches outgrow the graphs, or prompts mix with decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli import run
from moesim.engine.batcher import Plan, new_plan
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.graphs import captured_graphs
from moesim.engine.rules import engine_rules
from moesim.engine.stepmodel import ExactModel, StepModel
from moesim.spec.scenario import DispatchSpec, PoliciesSpec, load_scenario
from moesim.spec.workload import BatchingSpec
from tests.scenarios import small, write

RANKS = 8
CONTEXT = 250


def stepmodel(tmp_path: Path, batching: dict[str, Any] | None = None, **changes: Any) -> StepModel:
    data = small(**changes)
    data["serving"]["batching"].update(batching or {})
    return StepModel(resolve(groundwork(load_scenario(write(tmp_path, data)))), seed=0)


def planned(model: StepModel, decode: list[int], prompts: list[int], new: int = 200) -> Plan:
    plan = new_plan(RANKS, model.limits.max_running)
    plan.decode_seqs[:], plan.decode_kv[:] = decode, np.asarray(decode) * CONTEXT
    plan.prefill_seqs[:], plan.prefill_tokens[:] = prompts, np.asarray(prompts) * new
    return plan


@pytest.mark.parametrize("busy", [1, 2, 5])
def test_the_table_knows_idle_ranks(busy: int, tmp_path: Path) -> None:
    """One sequence on a few ranks touches fewer experts than one on each; the table once told them alike."""
    model = stepmodel(tmp_path)
    plan = planned(model, [1] * busy + [0] * (RANKS - busy), [0] * RANKS)
    exact = ExactModel(model, "maxplus")
    assert model.base(plan) == pytest.approx(float(np.mean([exact(plan) for _ in range(8)])), rel=0.02)


def test_decoding_beside_prompts_adds_its_attention(tmp_path: Path) -> None:
    """vLLM mixes: a rank that reads a prompt and decodes runs both attention kernels."""
    model = stepmodel(tmp_path, engine={"name": "vllm", "version": "1"})
    model_s = {}
    for name, kv in (("short", 1.0), ("long", 250.0)):
        plan = planned(model, [60] * RANKS, [1] * RANKS)
        plan.decode_kv[:] = 60 * kv
        model_s[name] = model.base(plan)
        assert model_s[name] == pytest.approx(ExactModel(model, "maxplus")(plan), rel=0.04)
    assert model_s["long"] > model_s["short"]


@pytest.mark.parametrize("decode", [4, 40])
def test_a_batch_beyond_the_largest_graph_runs_eagerly(decode: int, tmp_path: Path) -> None:
    within = stepmodel(tmp_path, {"cuda_graph_sizes": [decode]})
    beyond = stepmodel(tmp_path, {"cuda_graph_sizes": [2]})
    plan = planned(within, [decode] * RANKS, [0] * RANKS)
    eager = within.deployment.rules.eager_layer_s * within.deployment.setup.model.layers
    assert beyond.base(plan) - within.base(plan) == pytest.approx(eager, rel=1e-6)
    both = [ExactModel(model, "maxplus")(plan) for model in (beyond, within)]
    assert both[0] - both[1] == pytest.approx(eager, rel=1e-6)


def test_deepeps_normal_kernels_are_never_captured() -> None:
    rules, policies = engine_rules("sglang"), PoliciesSpec()
    assert captured_graphs(BatchingSpec(), policies, rules, mode="low_latency").padded(13) == 16
    assert captured_graphs(BatchingSpec(), policies, rules, mode="normal").sizes == ()
    gathered = PoliciesSpec(dispatch=DispatchSpec(backend="allgather_reducescatter"))
    assert captured_graphs(BatchingSpec(), gathered, rules, mode="normal").holds(512)
    assert not captured_graphs(BatchingSpec(), gathered, rules, mode="normal").holds(513)
    assert captured_graphs(BatchingSpec(cuda_graph_sizes="none"), policies, rules, mode="low_latency").sizes == ()
    listed = captured_graphs(BatchingSpec(cuda_graph_sizes=(32, 8)), policies, rules, mode="low_latency")
    assert [listed.padded(tokens) for tokens in (1, 9, 33)] == [8, 32, 33]


def test_graph_sizes_are_positive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, small())
    assert run(["simulate", str(path), "--set", "serving.batching.cuda_graph_sizes=[-8]", "--draws", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
