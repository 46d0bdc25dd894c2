"""A pass in closed form, by `maxplus` and by `des`: the same seconds, for every backend, recompute mode and plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.engine import des, maxplus
from moesim.engine.training import simulate_training, training_model
from moesim.graph.training_passes import chunk_graph, chunk_seconds, passes_of
from moesim.output.training_metrics import training_json
from tests.training_scenarios import asked

PLANS: list[dict[str, int]] = [
    {"tp": 1, "pp": 2, "attention_dp": 4, "ep": 4},
    {"tp": 2, "pp": 2, "attention_dp": 2, "ep": 4},
    {"tp": 2, "pp": 2, "cp": 2, "attention_dp": 1, "ep": 4},
    {"tp": 2, "pp": 1, "attention_dp": 2, "ep": 2, "expert_tp": 2},
    {"tp": 4, "pp": 4, "attention_dp": 1, "ep": 1, "expert_tp": 4},
]
MODULES = ("core_attn", "layernorm", "moe_act", "moe", "mlp")


@st.composite
def scenarios(draw: st.DrawFn) -> dict[str, Any]:
    plan = draw(st.sampled_from(PLANS))
    backends = ["alltoall", "allgather_reducescatter"] + (["deepep"] if plan.get("expert_tp", 1) == 1 else [])
    schedule = draw(st.sampled_from(["1f1b", "zero_bubble"] + (["interleaved"] if plan["pp"] > 1 else [])))
    return {
        "parallel": plan,
        "policies": {"dispatch": {"backend": draw(st.sampled_from(backends))}},
        "seed": draw(st.integers(0, 3)),
        "training": {
            "recompute": draw(st.sampled_from(["none", "selective", "full"])),
            "recompute_modules": sorted(draw(st.sets(st.sampled_from(MODULES), min_size=1))),
            "router": draw(st.sampled_from(["trace", "balanced"])),
            "global_batch": 64,
            "pipeline": {"schedule": schedule, "virtual_stages": 2 if schedule == "interleaved" else 1},
            "optimizer": {
                "overlap_gradients": draw(st.booleans()),
                "overlap_parameters": draw(st.booleans()),
                "distributed": draw(st.booleans()),
            },
        },
    }


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=scenarios())
def test_closed_form_maxplus_and_des_agree(changes: dict[str, Any]) -> None:
    model = training_model(asked(**changes), seed=changes["seed"])
    split = model.program.split
    chunk = model.chunks[-1]
    for kind in passes_of(split):
        graph = chunk_graph(model.layers, chunk, kind, split=split)
        fast = maxplus.run(graph)
        assert chunk_seconds(model.layers, chunk, kind, split=split) == pytest.approx(fast.step_s, rel=1e-9)
        slow = des.run(graph, step=0, sharing=False)
        assert slow.step_s[0] == pytest.approx(fast.step_s[0], rel=1e-9)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=scenarios())
def test_a_step_adds_up(changes: dict[str, Any]) -> None:
    """Operations, waits and bubble make the step; nothing is negative; shares sum to 1; tokens are conserved."""
    run = simulate_training(asked(**changes), draws=0)
    result = training_json(run)
    step = result["step"]
    assert min(step["by_operation_s"].values()) > 0
    assert sum(step["by_operation_s"].values()) == pytest.approx(step["step_s"], rel=1e-9)
    assert 0 <= step["bubble_share"] < 1
    assert step["exposed_communication_s"] >= 0
    assert len(step["by_rank_s"]) == run.model.setup.parallel.gpus
    assert max(step["by_rank_s"]) <= step["step_s"]
    assert sum(result["provenance"].values()) == pytest.approx(1.0)
    picks = run.model.setup.group_tokens * run.model.setup.model.moe.top_k
    assert run.model.pool.counts.sum(axis=-1) == pytest.approx(picks)
    assert run.model.setup.placement.rank_loads(run.model.pool.counts).sum(axis=-1) == pytest.approx(picks)
    ledger = result["memory"]["by_stage"]
    assert min(min(stage.values()) for stage in ledger) > 0
    assert result["memory"]["peak_bytes"] == pytest.approx(max(sum(stage.values()) for stage in ledger))


def test_more_of_anything_takes_longer() -> None:
    """Skew, recomputation and exposed gradients never make a step faster."""

    def step_s(**own: Any) -> float:
        return simulate_training(asked(training=own), draws=0).step.step_s

    assert step_s(router="trace") > step_s(router="balanced")
    plain, some, full = (step_s(recompute=mode) for mode in ("none", "selective", "full"))
    assert plain < some < full
    hidden = {"overlap_gradients": True, "overlap_parameters": True}
    assert step_s(optimizer=hidden) <= step_s()


def test_draws_are_paired_and_seeded() -> None:
    one, same = (simulate_training(asked(), draws=6) for _ in range(2))
    steps = np.asarray([step.step_s for step in one.drawn])
    assert steps.tolist() == [step.step_s for step in same.drawn]
    assert steps.min() < one.step.step_s < steps.max()
    assert simulate_training(asked(), draws=0, seed=5).step.step_s != one.step.step_s
