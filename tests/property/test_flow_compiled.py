"""The compiled loop of pipeline stages and the SimPy loop: the same run, to the last digit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.batch_rules import flow_of
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.draws import joint_draws
from moesim.engine.in_flight import Flow
from moesim.engine.memory_rules import RESERVE, SGLANG, VLLM
from moesim.engine.serving import Load, Served, serve
from moesim.engine.stepmodel import StepModel
from moesim.spec.scenario import load_scenario
from tests.property.test_serving_compiled import same
from tests.scenarios import small, write

ENGINES = ("sglang", "vllm", "trtllm")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StepModel]:
    folder = tmp_path_factory.mktemp("scenarios")
    found = {}
    for engine in ENGINES:
        data = small(engine={"name": engine, "version": "1"}, parallel={"attention_dp": 2, "ep": 2, "pp": 2})
        path = write(folder, data, f"{engine}.yaml")
        found[engine] = StepModel(resolve(groundwork(load_scenario(path))), seed=0)
    return found


def both(
    model: StepModel, load: Load, instances: int, *, rule: object = RESERVE, kv_tokens: int = 100_000,
    batches: int = 2, running: int | None = None, mixes: bool | None = None,
) -> tuple[Served, Served]:  # fmt: skip
    mixes = model.limits.mixes if mixes is None else mixes
    limits = model.limits._replace(kv_tokens=kv_tokens, max_running=6, rule=rule, mixes=mixes)
    draw = next(iter(joint_draws(1, model.routing.weights, 0)))
    timed, flow = model.under(draw), Flow(2, batches, running)
    looped, compiled = (
        serve(load, limits, ranks=2, instances=instances, step_time=timed, flow=flow, compiled=fast)
        for fast in (False, True)
    )
    return looped, compiled


rules = st.sampled_from([RESERVE, SGLANG, VLLM])
# Bursts at one instant, pauses that empty the queues, and gaps about as long as a stage.
arrivals = st.lists(st.sampled_from([0.0, 1e-4, 0.004, 0.02, 5.0]), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(
    gaps=arrivals, seed=st.integers(0, 99), instances=st.integers(1, 3), engine=st.sampled_from(ENGINES), rule=rules,
    tight=st.booleans(), batches=st.integers(1, 4), running=st.sampled_from([None, 2, 9]),
    front_end_s=st.sampled_from([0.0, 3e-4, 0.05, 2.0]),
)  # fmt: skip
def test_both_loops_agree(
    models: dict[str, StepModel], gaps: list[float], seed: int, instances: int, engine: str, rule: object, tight: bool,
    batches: int, running: int | None, front_end_s: float,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    load = Load(rng.integers(1, 240, len(gaps)), rng.integers(1, 24, len(gaps)), arrival_s=np.cumsum(gaps))
    load = dataclasses.replace(load, front_end_s=front_end_s)
    kv_tokens = 400 if tight else 100_000
    same(*both(models[engine], load, instances, rule=rule, kv_tokens=kv_tokens, batches=batches, running=running))


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 60), seed=st.integers(0, 99), concurrency=st.integers(1, 40), engine=st.sampled_from(ENGINES),
    rule=rules, tight=st.booleans(), batches=st.integers(1, 4), running=st.sampled_from([None, 2]),
)  # fmt: skip
def test_both_closed_loops_agree(
    models: dict[str, StepModel], count: int, seed: int, concurrency: int, engine: str, rule: object, tight: bool,
    batches: int, running: int | None,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    load = Load(rng.integers(1, 240, count), rng.integers(1, 24, count), concurrency=concurrency)
    kv_tokens = 400 if tight else 100_000
    same(*both(models[engine], load, 1, rule=rule, kv_tokens=kv_tokens, batches=batches, running=running))


def test_long_runs_agree_and_are_compiled(models: dict[str, StepModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Long enough for the log, the latencies and the table of prompts to grow; no compiled run may fall back."""
    rng = np.random.default_rng(7)
    count = 1200
    isl, osl = rng.integers(1, 4000, count), rng.integers(1, 60, count)
    open_loop = Load(isl, osl, arrival_s=np.cumsum(rng.exponential(4e-3, count)))
    closed_loop = Load(isl, osl, concurrency=30)
    model = models["vllm"]
    for load in (open_loop, closed_loop):
        one, other = both(model, load, 1)
        same(one, other)
        assert one.steps > 4096
    monkeypatch.setattr("moesim.engine.serving.Pool", None)
    flow = flow_of(model.deployment, model.limits)
    serve(closed_loop, model.limits, ranks=2, instances=1, step_time=model.under(None), flow=flow)
