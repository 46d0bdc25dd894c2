"""Two-batch overlap: its halves hold the whole batch's work, and the host's work between steps is not doubled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moesim.engine import maxplus
from moesim.engine.batcher import new_plan
from moesim.engine.collapsed import SCHEDULES, collapsed_seconds
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.draws import FAMILIES
from moesim.engine.step_graph import step_graph
from moesim.engine.stepmodel import ExactModel, StepModel
from moesim.engine.steptable import _collapse
from moesim.graph.batch import step_batch
from moesim.spec.scenario import load_scenario
from tests.scenarios import small, write

TWO_BATCH = {"schedule": "two_batch"}


def stepmodel(tmp_path: Path, **changes: object) -> StepModel:
    return StepModel(resolve(groundwork(load_scenario(write(tmp_path, small(**changes))))), seed=0)


@pytest.mark.parametrize("prompts", [1, 2, 3, 6])
@pytest.mark.parametrize("prefix", [0.0, 300.0])
def test_the_halves_hold_all_tokens_and_all_causal_pairs(prompts: int, prefix: float) -> None:
    whole = step_batch(
        ranks=2, prefill_seqs=prompts, prefill_new=100.0, prefill_prefix=prefix, decode_seqs=[[0.0, 6.0]]
    )
    half = whole.half()
    np.testing.assert_allclose(2 * half.tokens, whole.tokens)

    def pairs(batch: object) -> np.ndarray:
        new, before = batch.prefill_new, batch.prefill_prefix  # type: ignore[attr-defined]
        return np.asarray(batch.prefill_seqs * (new * before + new * new / 2))  # type: ignore[attr-defined]

    np.testing.assert_allclose(2 * pairs(half), pairs(whole))
    assert (half.prefill_seqs >= 1).all()


def test_the_host_works_once_between_steps(tmp_path: Path) -> None:
    model = stepmodel(tmp_path, policies=TWO_BATCH)
    batch = step_batch(ranks=8, decode_seqs=16.0, decode_kv=100.0)
    _, times = ExactModel(model, "maxplus").run(batch, "decode")
    assert times.busy_s["engine_overhead"].max() == pytest.approx(model.deployment.rules.step_overhead_s)


def test_the_table_agrees_on_ranks_that_read_one_prompt_each(tmp_path: Path) -> None:
    """Long prompts, so that attention weighs: cutting a lone prompt in two must not halve or double it."""
    data = small(policies=TWO_BATCH)
    data["serving"]["workload"]["isl"] = 8192
    data["serving"]["batching"]["max_batch_tokens_per_dp_rank"] = 8192
    model = StepModel(resolve(groundwork(load_scenario(write(tmp_path, data)))), seed=0)
    plan = new_plan(8, model.limits.max_running)
    plan.prefill_seqs[:], plan.prefill_tokens[:] = 1, 8192
    assert model.base(plan) == pytest.approx(ExactModel(model, "maxplus")(plan), rel=0.02)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("backend", ["deepep", "allgather_reducescatter"])
def test_collapsed_steps_take_what_the_executor_says(tmp_path: Path, schedule: str, backend: str) -> None:
    """The skeleton's times are those of `maxplus` on the graph of the same step, to the last digit."""
    model = stepmodel(tmp_path, policies={"schedule": schedule, "dispatch": {"backend": backend}})
    setup = model.deployment.setup
    for kind in ("decode", "prefill"):
        priced = _collapse(model.grid(kind).priced, 3)
        micro = [priced, priced] if schedule == "two_batch" else [priced]
        for normal in (None, dict.fromkeys(FAMILIES, 0.5)):
            found = collapsed_seconds(setup, micro, normal)
            assert found is not None
            graph = step_graph(setup, micro, normal=normal, collapsed=True)
            np.testing.assert_array_equal(found, maxplus.run(graph).step_s)
