"""Axes by key: what may be one, what its values become, and spaces too large to be checked whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli import run
from moesim.engine.deployment import groundwork
from moesim.spec.scenario import Scenario, load_scenario
from placement import space as space_module
from placement.axes import axes_of, value_at
from placement.plans import baseline_plan
from placement.space import Space, enumerate_space
from tests.scenarios import small, write

TOKENS = "serving.batching.max_batch_tokens_per_dp_rank"
REPLICA = "policies.dispatch.replica"
AXES = {TOKENS: [2048, 4096], REPLICA: ["equal", "local_first"]}


def load(tmp_path: Path, axes: Any, **changes: Any) -> Scenario:
    search = {"solvers": ["greedy", "contiguous"], "redundant_experts": [0, 8], "axes": axes}
    return load_scenario(write(tmp_path, small(search=search, **changes)))


def spaces(scenario: Scenario) -> Space:
    ground = groundwork(scenario)
    return enumerate_space(ground, ground.scenario)


def test_every_combination_is_a_plan_and_reaches_the_scenario(tmp_path: Path) -> None:
    scenario, plain = load(tmp_path, AXES), load(tmp_path, None)
    found, without = spaces(scenario), spaces(plain)
    own = value_at(scenario, TOKENS, where="")
    tokens = len({own, 2048, 4096})
    assert found.size == len(found.plans) == tokens * 2 * without.size
    plan = next(one for one in found.plans if dict(one.options) == {TOKENS: 2048, REPLICA: "equal"})
    applied = plan.apply(scenario)
    assert applied.serving is not None
    assert applied.serving.batching.max_batch_tokens_per_dp_rank == 2048
    assert applied.policies.dispatch.replica == "equal"
    assert "max_batch_tokens_per_dp_rank 2048" in plan.label()
    assert "replica equal" in plan.label()
    assert found.find(list(plan.params().values())) == plan
    assert found.find([*list(plan.params().values())[:-1], "nearest"]) is None


def test_the_baseline_keeps_the_scenarios_own_values(tmp_path: Path) -> None:
    scenario = load(tmp_path, AXES)
    base = baseline_plan(groundwork(scenario), scenario)
    assert dict(base.options) == {key: value_at(scenario, key, where="") for key in AXES}
    assert base in spaces(scenario)
    assert [axis.values[0] for axis in axes_of(scenario)] == [value for _, value in base.options]


@pytest.mark.parametrize(
    ("axes", "what"),
    [
        ({"serving.batching.max_tokens": [1]}, "no key"),
        ({"parallel.tp": [1, 2]}, "search.parallel"),
        ({"placement.solver": ["greedy"]}, "search.solvers"),
        ({"model": ["a"]}, "what is asked for"),
        ({"serving.workload.isl": [10]}, "what is asked for"),
        ({"serving.batching": [1]}, "no single value"),
        ({TOKENS: []}, "no value to try"),
        ({TOKENS: [-5]}, "greater than 0"),
        ({REPLICA: ["nearest"]}, "local_first"),
        ({"training.micro_batch": [1]}, "no key"),
    ],
)
def test_what_is_no_axis_is_refused_in_one_line(axes: Any, what: str, tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path, small(search={"axes": axes}))
    assert run(["tune", str(path), "--trials", "2", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert what in said
    assert len(said.strip().splitlines()) == 1


def test_values_that_contradict_a_plan_are_counted_where_they_meet(tmp_path: Path, capsys: Any) -> None:
    """A batch without room for prompts beside the running requests contradicts an engine that mixes them."""
    running = "serving.batching.max_running_requests_per_dp_rank"
    search = {"parallel": "fixed", "placement": "fixed", "axes": {TOKENS: [16, 4096], running: [8, 64]}}
    data = small(search=search, engine={"name": "vllm", "version": "0.12.0"}, cost={"source": "roofline"})
    data["serving"]["workload"]["requests"] = 20
    data["serving"]["batching"] = {"max_batch_tokens_per_dp_rank": 4096, "max_running_requests_per_dp_rank": 8}
    path = write(tmp_path, data)
    assert run(["tune", str(path), "--trials", "50", "--out", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    status = {one["label"]: one["status"] for one in found["trial_list"]}
    short = [name for name in status if "max_batch_tokens_per_dp_rank 16" in name]
    assert all(status[name] == "contradictory" for name in short if "requests_per_dp_rank 64" in name)
    assert all(status[name] == "ok" for name in short if "requests_per_dp_rank 8" in name)
    assert found["infeasible"]["contradictory"] == sum(word == "contradictory" for word in status.values()) > 0


def test_a_scenario_that_contradicts_itself_is_told(tmp_path: Path, capsys: Any) -> None:
    data = small(engine={"name": "vllm", "version": "0.12.0"}, cost={"source": "roofline"})
    data["serving"]["batching"] = {"max_batch_tokens_per_dp_rank": 16, "max_running_requests_per_dp_rank": 64}
    path = write(tmp_path, data)
    assert run(["tune", str(path), "--trials", "3", "--out", str(tmp_path / "run")]) == 2
    assert "leave no room" in capsys.readouterr().err


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Space, Space]:
    """The same space checked whole, and by sample."""
    scenario = load(tmp_path, AXES)
    whole = spaces(scenario)
    monkeypatch.setattr(space_module, "ENUMERATED", 10)
    return whole, spaces(scenario)


def test_a_large_space_is_sampled_and_agrees_with_the_whole(large: tuple[Space, Space]) -> None:
    whole, sampled = large
    assert sampled.estimated
    assert sampled.size == pytest.approx(whole.size, rel=0.1)
    assert set(sampled.plans) <= set(whole.plans)
    for plan in whole.plans:
        assert plan in sampled
        assert sampled.find([plan.params()[name] for name in sampled.choices]) == plan
    rng = np.random.default_rng(0)
    some = sampled.untried({whole.plans[0]}, 30, rng)
    assert len(set(some)) == 30
    assert set(some) <= set(whole.plans) - {whole.plans[0]}


def test_a_search_of_a_large_space_runs_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(space_module, "ENUMERATED", 10)
    search = {"solvers": ["greedy", "contiguous"], "redundant_experts": [0, 8], "axes": AXES}
    data = small(search=search)
    data["serving"]["workload"]["requests"] = 40
    path = write(tmp_path, data)

    def tune(trials: int, folder: str, *more: str) -> dict[str, Any]:
        asked = ["tune", str(path), "--trials", str(trials), "--out", str(tmp_path / folder), "--json", *more]
        assert run(asked) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    once = tune(20, "once")
    tune(12, "twice")
    twice = tune(20, "twice", "--resume")
    assert once["space_estimated"] is True
    assert [one["label"] for one in once["trial_list"]] == [one["label"] for one in twice["trial_list"]]
    assert len({one["label"] for one in once["trial_list"]}) == 20
    assert not once["exhausted"]
