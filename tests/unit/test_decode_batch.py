"""How an engine runs a decode batch of so many tokens a rank: its mode whatever is measured, and when it never runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moesim.engine import steptime
from moesim.engine.decode_batch import decode_mode, refused
from moesim.engine.deployment import Deployment, Groundwork, groundwork, resolve, solve
from moesim.engine.layer_cost import LayerCosts
from moesim.errors import OutsideProfile
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import load_scenario
from tests.scenarios import small, write


def deployment(folder: Path, **changes: Any) -> Deployment:
    data = small(policies={"dispatch": {"backend": "deepep", "mode": changes.pop("mode", "auto")}})
    data["serving"]["batching"]["max_running_requests_per_dp_rank"] = 256
    data["serving"]["workload"] = {"isl": 100, "osl": 20, "requests": 4, "arrivals": {"concurrency": 1}, **changes}
    return resolve(groundwork(load_scenario(write(folder, data))))


@pytest.mark.parametrize(("mode", "few", "many"), [("auto", "low_latency", "normal"), ("normal", "normal", "normal")])
def test_the_mode_is_the_engines(mode: str, few: str, many: str, tmp_path: Path) -> None:
    one = deployment(tmp_path, mode=mode)
    assert [decode_mode(one, tokens) for tokens in (8, 128, 129)] == [few, few, many]


def test_limits_of_requests_and_of_low_latency_are_named(tmp_path: Path) -> None:
    one = deployment(tmp_path)
    most = one.serving.batching.max_running_requests_per_dp_rank
    assert not refused(one, 128)
    assert "low-latency dispatch takes at most 128 requests" in refused(one, 129)
    assert f"at most {most} requests" not in refused(one, most)
    assert f"a rank runs at most {most} requests" in refused(one, most + 1)
    assert not refused(deployment(tmp_path, mode="normal"), most)


def test_the_cache_must_hold_the_requests_in_the_middle_of_their_output(tmp_path: Path) -> None:
    probe = deployment(tmp_path, mode="normal")
    room = probe.memory.kv_capacity_tokens
    isl = room // 64 - 10
    assert not refused(deployment(tmp_path, mode="normal", isl=isl), 64)
    assert "need a KV cache of" in refused(deployment(tmp_path, mode="normal", isl=isl + 1), 64)


@pytest.fixture
def ground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groundwork:
    """A profile whose low-latency tables do not cover experts in order."""
    price = steptime.price_steps

    def covered(one: Deployment, routing: Any, tokens: int, mode: str, seed: int, **more: Any) -> Any:
        if mode == "low_latency" and one.setup.placement.solver in ("contiguous", "in order"):
            raise OutsideProfile("too hot", where="profile", mend="measure it")
        return price(one, routing, tokens, mode, seed, **more)

    monkeypatch.setattr(steptime, "price_steps", covered)
    monkeypatch.setattr("moesim.engine.layer_cost.price_steps", covered)
    return groundwork(load_scenario(write(tmp_path, small())))


def test_one_that_leaves_the_profile_is_left_out_and_moves_no_other_to_another_mode(ground: Groundwork) -> None:
    parallel = ParallelSpec(attention_dp=8, ep=8)
    plans = {
        name: solve(ground, name, slots=64, parallel=parallel, groups=1, loads=ground.fit)
        for name in ("contiguous", "greedy")
    }
    (both,) = steptime.timed_placements(ground, plans, ground.judge, [32], 3, 0)
    (alone,) = steptime.timed_placements(ground, {"greedy": plans["greedy"]}, ground.judge, [32], 3, 0)
    assert both.mode == alone.mode == "low_latency"
    assert both.left_out == {"contiguous": "profile: too hot; measure it"}
    assert list(both.step_s) == list(both.balance) == ["greedy"]
    assert both.step_s["greedy"].tolist() == alone.step_s["greedy"].tolist()
    with pytest.raises(OutsideProfile, match="too hot"):
        steptime.timed_placements(ground, {"contiguous": plans["contiguous"]}, ground.judge, [32], 0, 0)


def test_the_cost_of_a_layer_is_fitted_in_the_mode_that_runs(ground: Groundwork) -> None:
    assert LayerCosts(ground, ground.fit, 0).at(32).mode == "low_latency"
