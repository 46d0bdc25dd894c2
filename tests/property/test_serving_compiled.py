"""The compiled serving loop and the SimPy loop: the same run, to the last digit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.deployment import groundwork, resolve
from moesim.engine.draws import joint_draws
from moesim.engine.serving import Load, Served, serve
from moesim.engine.stepmodel import StepModel, TimedModel
from moesim.errors import OutsideProfile
from moesim.spec.scenario import load_scenario
from tests.scenarios import small, write

ENGINES = ("sglang", "vllm")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StepModel]:
    folder = tmp_path_factory.mktemp("scenarios")
    found = {}
    for engine in ENGINES:
        path = write(folder, small(engine={"name": engine, "version": "1"}), f"{engine}.yaml")
        found[engine] = StepModel(resolve(groundwork(load_scenario(path))), seed=0)
    return found


def both(
    model: StepModel, load: Load, instances: int, *, chunked: bool, kv_tokens: int, balance: str = "round_robin",
    hold: int = 0, gather: int = 0, front_end_s: float = 0.0,
) -> tuple[Served, Served]:  # fmt: skip
    load = dataclasses.replace(load, front_end_s=front_end_s)
    limits = model.limits._replace(
        chunked=chunked, kv_tokens=kv_tokens, max_running=6, hold_steps=hold, gather_steps=gather
    )
    draw = next(iter(joint_draws(1, model.routing.weights, 0)))
    looped, compiled = (
        serve(load, limits, ranks=8, instances=instances, step_time=model.under(draw), balance=balance, compiled=fast)
        for fast in (False, True)
    )
    return looped, compiled


def same(one: Served, other: Served) -> None:
    # Steps of several instances that start at one instant have no order.
    orders = [np.lexsort((run.step_instance, run.step_start_s)) for run in (one, other)]
    for field in dataclasses.fields(Served):
        values = [getattr(run, field.name) for run in (one, other)]
        if field.name in ("gap_s", "gap_n"):  # instance by instance here, by time there
            values = [np.sort(run.gaps_s) for run in (one, other)]
        elif field.name.startswith("step_"):
            values = [value[order] for value, order in zip(values, orders, strict=True)]
        np.testing.assert_array_equal(*values, err_msg=field.name)


holds = st.sampled_from([0, 0, 1, 4, 30])
# The front end's seconds with a request: none, less than a step, many steps, longer than most requests last.
front_ends = st.sampled_from([0.0, 0.0, 3e-4, 0.05, 2.0])
# Bursts at one instant, pauses that empty the queues, and gaps about as long as a step.
arrivals = st.lists(st.sampled_from([0.0, 1e-4, 0.004, 0.02, 5.0]), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(
    gaps=arrivals, seed=st.integers(0, 99), instances=st.integers(1, 3), engine=st.sampled_from(ENGINES),
    chunked=st.booleans(), tight=st.booleans(), hold=holds, gather=st.integers(0, 3), front_end_s=front_ends,
)  # fmt: skip
def test_both_loops_agree(
    models: dict[str, StepModel], gaps: list[float], seed: int, instances: int, engine: str, chunked: bool, tight: bool,
    hold: int, gather: int, front_end_s: float,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    load = Load(rng.integers(1, 240, len(gaps)), rng.integers(1, 24, len(gaps)), arrival_s=np.cumsum(gaps))
    kv_tokens = 400 if tight else 100_000
    asked: dict[str, Any] = {"hold": hold, "gather": gather, "front_end_s": front_end_s}
    same(*both(models[engine], load, instances, chunked=chunked, kv_tokens=kv_tokens, **asked))


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 60), seed=st.integers(0, 99), concurrency=st.integers(1, 80), engine=st.sampled_from(ENGINES),
    chunked=st.booleans(), tight=st.booleans(), balance=st.sampled_from(["round_robin", "shortest_queue"]),
    hold=holds, gather=st.integers(0, 3), front_end_s=front_ends,
)  # fmt: skip
def test_both_closed_loops_agree(
    models: dict[str, StepModel], count: int, seed: int, concurrency: int, engine: str, chunked: bool, tight: bool,
    balance: str, hold: int, gather: int, front_end_s: float,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    load = Load(rng.integers(1, 240, count), rng.integers(1, 24, count), concurrency=concurrency)
    kv_tokens = 400 if tight else 100_000
    asked: dict[str, Any] = {"balance": balance, "hold": hold, "gather": gather, "front_end_s": front_end_s}
    same(*both(models[engine], load, 1, chunked=chunked, kv_tokens=kv_tokens, **asked))


@settings(max_examples=15, deadline=None)
@given(
    gaps=st.lists(st.sampled_from([0.0, 0.004, 0.3, 5.0]), min_size=1, max_size=20), seed=st.integers(0, 99),
    instances=st.integers(1, 2), engine=st.sampled_from(ENGINES), chunked=st.booleans(),
    kv_tokens=st.sampled_from([600, 100_000]), concurrency=st.one_of(st.none(), st.integers(1, 9)),
    front_end_s=front_ends,
)  # fmt: skip
def test_long_outputs_agree(
    models: dict[str, StepModel], gaps: list[float], seed: int, instances: int, engine: str, chunked: bool,
    kv_tokens: int, concurrency: int | None, front_end_s: float,
) -> None:  # fmt: skip
    """Hundreds of decode steps between two that anybody joins or leaves; some wait for memory all the while."""
    rng = np.random.default_rng(seed)
    arrival_s = None if concurrency else np.cumsum(gaps)
    load = Load(rng.integers(1, 240, len(gaps)), rng.integers(1, 350, len(gaps)), arrival_s, concurrency)
    count = 1 if concurrency else instances
    same(*both(models[engine], load, count, chunked=chunked, kv_tokens=kv_tokens, front_end_s=front_end_s))


@pytest.mark.parametrize("balance", ["round_robin", "shortest_queue"])
@pytest.mark.parametrize(("hold", "gather"), [(0, 0), (7, 0), (50, 3)])
def test_a_long_closed_loop_agrees_and_is_compiled(
    models: dict[str, StepModel], balance: str, hold: int, gather: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths so uneven that turns and queues part ways; the compiled runs must not fall back to SimPy."""
    rng = np.random.default_rng(7)
    load = Load(rng.integers(1, 240, 600), rng.integers(1, 60, 600), concurrency=70)
    one, other = both(
        models["vllm"], load, 1, chunked=True, kv_tokens=100_000, balance=balance, hold=hold, gather=gather
    )
    same(one, other)
    monkeypatch.setattr("moesim.engine.serving.Pool", None)
    limits = models["vllm"].limits._replace(max_running=6, hold_steps=hold, gather_steps=gather)
    serve(load, limits, ranks=8, instances=1, step_time=models["vllm"].under(None), balance=balance)


def test_held_prompts_and_queues_change_a_run(models: dict[str, StepModel]) -> None:
    """What the agreement above is about does something: each rule gives another run than none."""
    rng = np.random.default_rng(7)
    load = Load(rng.integers(1, 240, 600), rng.integers(1, 60, 600), concurrency=70)
    asked: list[dict[str, Any]] = [{}, {"balance": "shortest_queue"}, {"hold": 7}, {"hold": 7, "gather": 3}]
    runs = [both(models["vllm"], load, 1, chunked=True, kv_tokens=100_000, **one)[1].duration_s for one in asked]
    assert len(set(runs)) == len(runs)


def test_many_prompt_lengths_and_a_long_run_agree(models: dict[str, StepModel]) -> None:
    rng = np.random.default_rng(1)
    count = 3000
    load = Load(rng.integers(1, 2000, count), rng.integers(1, 40, count), np.cumsum(rng.exponential(2e-3, count)))
    one, other = both(models["sglang"], load, 1, chunked=True, kv_tokens=100_000)
    same(one, other)
    assert one.steps > 4096 or len(set(load.isl.tolist())) > 64  # the log, or the table of prompts, has grown


def test_a_step_outside_the_priced_grid_is_the_same_error(
    models: dict[str, StepModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["sglang"]
    refusal = OutsideProfile("nothing measured here", mend="measure it")
    asked = TimedModel.table

    def cut(timed: TimedModel, kind: str) -> object:
        return dataclasses.replace(asked(timed, kind), tokens=asked(timed, kind).tokens + 1e6, lower=refusal)

    monkeypatch.setattr(TimedModel, "table", cut)
    load = Load(np.array([100]), np.array([4]), arrival_s=np.zeros(1))
    for fast in (False, True):
        with pytest.raises(OutsideProfile, match="nothing measured here"):
            serve(load, model.limits, ranks=8, instances=1, step_time=model.under(None), compiled=fast)


def test_exact_models_and_closed_loops_take_the_simpy_loop(models: dict[str, StepModel], tmp_path: Path) -> None:
    """They time steps one by one, or couple the instances: the compiled loop is not theirs, and nothing changes."""
    model = models["sglang"]
    load = Load(np.full(30, 100), np.full(30, 5), concurrency=8)
    runs = [
        serve(load, model.limits, ranks=8, instances=2, step_time=model.under(None), compiled=fast)
        for fast in (False, True)
    ]
    same(*runs)
