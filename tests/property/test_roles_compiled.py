"""The compiled loop over prefill and decode pools and the SimPy processes: the same run, to the last digit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.deployment import groundwork, resolve
from moesim.engine.memory_rules import RESERVE, SGLANG, VLLM
from moesim.engine.roles import RolePool, Transfer, serve_roles
from moesim.engine.serving import Load, Served
from moesim.engine.simulate import role_pool
from moesim.engine.stepmodel import StepModel
from moesim.spec.scenario import load_scenario
from tests.scenarios import small, write


def pools(folder: Path, name: str, **changes: Any) -> list[RolePool]:
    data = small(engine={"name": name, "version": "1"})
    data.update({key: value for key, value in changes.items() if key != "speculative"})
    data["serving"]["roles"] = {
        "prefill": {"gpus": 2, "replicas": 2, "parallel": {"attention_dp": 2, "ep": 2}},
        "decode": {"gpus": 4, "parallel": {"attention_dp": 4, "ep": 4}},
    }
    data["serving"]["speculative"] = changes.get("speculative")
    decode = resolve(groundwork(load_scenario(write(folder, data, f"{name}.yaml"))))
    assert decode.prefill is not None
    models = [StepModel(one, seed=0) for one in (decode.prefill, decode)]
    return [role_pool(model, model.under(None)) for model in models]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[RolePool]]:
    folder = tmp_path_factory.mktemp("scenarios")
    return {name: pools(folder, name) for name in ("sglang", "vllm")}


def same(one: Served, other: Served) -> None:
    # Steps of several instances that begin at one instant are logged in either order.
    orders = [np.lexsort((run.step_instance, run.step_start_s)) for run in (one, other)]
    for field in dataclasses.fields(Served):
        values = [getattr(run, field.name) for run in (one, other)]
        if field.name in ("events", "prefill"):
            continue
        if field.name.startswith("step_"):
            values = [value[order] for value, order in zip(values, orders, strict=True)]
        if field.name in ("gap_s", "gap_n"):  # of several instances: in another order where their steps end together
            values = [np.sort(run.gaps_s) for run in (one, other)]
        np.testing.assert_array_equal(*values, err_msg=field.name)


# Bursts at one instant, pauses that empty the queues, and gaps about as long as a step.
GAPS = (0.0, 1e-4, 0.004, 0.02, 5.0)
# A request: prompt, output, seconds since the one before (of an open loop).
REQUESTS = st.tuples(st.integers(1, 400), st.integers(1, 12), st.sampled_from(GAPS))


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(["sglang", "vllm"]),
    asked=st.lists(REQUESTS, min_size=1, max_size=40, unique=True),
    concurrency=st.one_of(st.none(), st.integers(1, 20)),
    front_end_s=st.sampled_from([0.0, 0.0, 3e-4, 0.05, 2.0]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    by_layer=st.booleans(),
    rate=st.sampled_from([1e6, 1e9, 1e12]),
    rule=st.sampled_from([RESERVE, SGLANG, VLLM]),
    kv_tokens=st.sampled_from([512, 100000]),
    holds=st.sampled_from([(0, 0), (2, 0), (5, 3)]),
)
def test_the_compiled_loop_is_the_processes(
    models: dict[str, list[RolePool]], name: str, asked: list[tuple[int, int, float]], concurrency: int | None,
    front_end_s: float, shape: tuple[int, int], by_layer: bool, rate: float, rule: Any, kv_tokens: int,
    holds: tuple[int, int],
) -> None:  # fmt: skip
    isl, osl, gaps = (np.asarray(one) for one in zip(*asked, strict=True))
    load = Load(isl, osl, None if concurrency else np.cumsum(gaps), concurrency, front_end_s=front_end_s)
    transfer = Transfer(bytes_per_token=1000.0, gpus=1, bytes_per_s=rate, latency_s=1e-5, layers=16, by_layer=by_layer)
    sized = [
        dataclasses.replace(
            pool,
            instances=count,
            limits=pool.limits._replace(
                max_running=5, kv_tokens=kv_tokens, rule=rule, hold_steps=holds[0], gather_steps=holds[1]
            ),
        )
        for pool, count in zip(models[name], shape, strict=True)
    ]
    looped, compiled = (serve_roles(load, *sized, transfer, compiled=fast) for fast in (False, True))
    same(looped, compiled)
    assert looped.prefill is not None
    assert compiled.prefill is not None
    same(looped.prefill.served, compiled.prefill.served)
    for field in ("transfer_s", "sender", "receiver"):
        np.testing.assert_array_equal(getattr(looped.prefill, field), getattr(compiled.prefill, field), err_msg=field)
    joined, several = compiled.prefill.joined_s, osl > 1
    assert joined is not None
    begun = np.isfinite(joined)
    assert (joined[begun] >= compiled.first_token_s[begun] - 1e-12).all()
    assert not begun[~several].any()
    # One that is preempted before its first decode step is read again, and may get all its tokens that way.
    assert begun[several].all() or compiled.preemptions > 0


@pytest.mark.parametrize("open_loop", [True, False])
def test_a_long_run_agrees_and_is_compiled(
    models: dict[str, list[RolePool]], open_loop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So long that the log and the table of prompts grow; the compiled run must not fall back to SimPy."""
    rng = np.random.default_rng(3)
    count = 3500
    arrival_s = np.cumsum(rng.exponential(4e-3, count)) if open_loop else None
    load = Load(
        rng.integers(1, 900, count), rng.integers(1, 60, count), arrival_s, None if open_loop else 8, front_end_s=1e-3
    )
    transfer = Transfer(bytes_per_token=1000.0, gpus=1, bytes_per_s=1e9, latency_s=1e-5, layers=16, by_layer=True)
    looped = serve_roles(load, *models["sglang"], transfer, compiled=False)
    monkeypatch.setattr("moesim.engine.roles.Pool", None)
    compiled = serve_roles(load, *models["sglang"], transfer)
    same(looped, compiled)
    assert compiled.steps > 4096


@pytest.mark.parametrize("open_loop", [True, False])
def test_drafts_take_as_long_as_in_the_processes(tmp_path: Path, open_loop: bool) -> None:
    asked = pools(
        tmp_path,
        "trtllm",
        model="deepseek-ai/DeepSeek-R1",
        cluster={"system": "b300_sxm", "nodes": 1, "gpus_per_node": 8},
        precision={"dense": "nvfp4", "experts": "nvfp4", "dispatch": "bf16", "combine": "bf16"},
        placement={"redundant_experts": 0},
        routing={"synthetic": {"kind": "lognormal", "sigma": 0.2, "workloads": 1}},
        speculative={"method": "mtp", "draft_tokens": 2, "acceptance": 0.7},
    )
    rng = np.random.default_rng(1)
    lengths = rng.integers(50, 400, 40), rng.integers(2, 60, 40)
    load = Load(*lengths, np.cumsum(rng.exponential(0.02, 40))) if open_loop else Load(*lengths, concurrency=9)
    transfer = Transfer(bytes_per_token=1000.0, gpus=1, bytes_per_s=1e9, latency_s=1e-5, layers=16, by_layer=False)
    looped, compiled = (serve_roles(load, *asked, transfer, compiled=fast) for fast in (False, True))
    np.testing.assert_allclose(compiled.finish_s, looped.finish_s, rtol=1e-9)
    np.testing.assert_allclose(compiled.first_token_s, looped.first_token_s, rtol=1e-9)
    assert compiled.steps == looped.steps
