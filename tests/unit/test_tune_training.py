"""The search over training plans: contract keys, files, resume, workers, bounds, keys that contradict each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moesim.cli import run
from moesim.engine.training import simulate_training
from moesim.engine.training_plan import SharedTraining
from moesim.errors import BadInput
from moesim.spec.scenario import Scenario
from placement.training_space import FACTORS, training_space
from tests.scenarios import write
from tests.training_scenarios import training

NARROW: dict[str, Any] = {
    "parallel": "fixed",
    "axes": {"training.pipeline.virtual_stages": [1], "training.micro_batch": [1, 2]},
}
CAPPED: dict[str, Any] = {"dispatch": {"backend": "alltoall"}, "capacity": {"rule": "megatron", "factor": 1.0}}


def tuned(path: Path, out: Path, capsys: pytest.CaptureFixture[str], trials: int, *more: str) -> dict[str, Any]:
    assert run(["tune", str(path), "--trials", str(trials), "--out", str(out), "--json", *more]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    code = run(["tune", str(path), "--trials", "6", "--out", str(path.parent / "no"), *more])
    told = capsys.readouterr().err.strip()
    assert told.count("\n") == 0
    assert "Traceback" not in told
    return code, told


def space_of(**changes: Any) -> tuple[Any, Any, Any]:
    return training_space(Scenario.model_validate(training(**changes)), SharedTraining())


def test_the_run_has_the_contracts_keys_and_its_plan_can_be_simulated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tuned(write(tmp_path, training()), tmp_path / "run", capsys, 12)
    for key in ("best", "baseline", "gain", "verdict", "pareto", "trials", "space", "infeasible", "run"):
        assert key in result
    assert result["trials"] == 12 == len({trial["label"] for trial in result["trial_list"]})
    assert result["gain"]["low"] <= result["gain"]["value"] <= result["gain"]["high"]
    assert result["verdict"]["code"] == "gain"
    assert result["validation"][0]["claim"] == "training_step"
    assert result["validation"][0]["status"] != "validated"
    assert {"backend_needs_ep", "contradictory"} <= set(result["infeasible"])
    assert run(["simulate", str(tmp_path / "run" / "plan.yaml"), "--draws", "0", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["metrics"]["step_s"] == pytest.approx(result["best"]["metrics"]["step_s"], rel=1e-12)
    assert "moesim training report" in (tmp_path / "run" / "report.html").read_text()
    steps = [plan["metrics"]["step_s"] for plan in result["pareto"]]
    memory = [plan["metrics"]["memory_peak_bytes"] for plan in result["pareto"]]
    assert steps == sorted(steps)
    assert memory == sorted(memory, reverse=True)


def test_a_small_space_is_evaluated_whole_and_its_best_is_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every legal plan simulated one by one, without what the search shares between plans."""
    data = training(search=NARROW)
    space, _, _ = space_of(search=NARROW)
    result = tuned(write(tmp_path, data), tmp_path / "run", capsys, 1000)
    assert result["exhausted"]
    assert result["trials"] == result["space"] == len(space.plans)
    scenario = Scenario.model_validate(data)
    alone = {plan.label(): simulate_training(plan.apply(scenario), draws=0).step.step_s for plan in space.plans}
    found = {trial["label"]: trial["metrics"]["step_s"] for trial in result["trial_list"]}
    assert found == pytest.approx(alone, rel=1e-12)
    assert result["best"]["metrics"]["step_s"] == pytest.approx(min(alone.values()), rel=1e-12)


def test_two_workers_and_a_resume_find_the_same_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What two workers have tried when the search is cut, and what one goes on with, is what one tries alone."""
    path = write(tmp_path, training())
    one = tuned(path, tmp_path / "one", capsys, 34)
    two = tuned(path, tmp_path / "cut", capsys, 27, "--workers", "2")
    cut = tuned(path, tmp_path / "cut", capsys, 34, "--resume")
    assert cut["run"]["resumed_trials"] == 27
    assert one["trial_list"][:27] == two["trial_list"]
    assert one["trial_list"] == cut["trial_list"]
    assert len({trial["label"] for trial in cut["trial_list"]}) == 34


def test_every_plan_of_the_space_is_legal_and_uses_all_gpus() -> None:
    space, own, _ = space_of()
    assert own in space
    layouts = {plan.parallel for plan in space.plans}
    assert {layout.pp for layout in layouts} >= {1, 2, 4}
    assert any(layout.cp > 1 for layout in layouts)
    assert any(layout.expert_tp > 1 for layout in layouts)
    for layout in layouts:
        assert 16 % layout.gpus == 0
        assert layout.ep * layout.expert_tp == layout.tp * layout.cp * layout.attention_dp
    assert {plan.backend for plan in space.plans} == {"alltoall", "deepep"}
    assert {plan.schedule for plan in space.plans} == {"sequential", "forward_backward"}


def test_the_capacity_factor_is_a_grid_and_the_drop_policy_an_axis() -> None:
    space, own, _ = space_of(policies=CAPPED, search={**NARROW, "capacity_factor": [1.0, 2.0]})
    tried = {dict(plan.options)["policies.capacity.factor"] for plan in space.plans}
    assert tried == {1.0, 1.25, 1.5, 1.75, 2.0}
    assert len(tried) == FACTORS
    assert {dict(plan.options)["policies.capacity.drop"] for plan in space.plans} == {None, "position"}
    assert own in space


def test_drops_against_step_time_is_the_front_of_a_capped_scenario(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = {**NARROW["axes"], "training.recompute": ["selective"], "training.pipeline.schedule": ["1f1b"]}
    search = {"parallel": "fixed", "schedules": ["sequential"], "backends": ["alltoall"], "axes": axes}
    path = write(tmp_path, training(policies=CAPPED, search={**search, "capacity_factor": [0.5, 2.0]}))
    result = tuned(path, tmp_path / "run", capsys, 1000)
    assert result["pareto_axes"] == ["step_s", "dropped_fraction"]
    steps = [plan["metrics"]["step_s"] for plan in result["pareto"]]
    drops = [plan["metrics"]["dropped_fraction"] for plan in result["pareto"]]
    assert steps == sorted(steps)
    assert drops == sorted(drops, reverse=True)
    assert len(drops) >= 3
    assert drops[0] > 0.2 > drops[-1]
    few = tuned(path, tmp_path / "few", capsys, 1000, "--set", "objective.limits.dropped_fraction=0.1")
    assert few["best"]["metrics"]["dropped_fraction"] <= 0.1
    assert few["best"]["metrics"]["step_s"] > result["best"]["metrics"]["step_s"]
    assert few["missed_limits"] > 0
    least = tuned(path, tmp_path / "least", capsys, 1000, "--set", "objective.minimize=dropped_fraction")
    assert least["best"]["metrics"]["dropped_fraction"] == min(drops)


@pytest.mark.parametrize("metric", ["mfu", "memory_headroom_bytes"])
def test_other_objectives(tmp_path: Path, capsys: pytest.CaptureFixture[str], metric: str) -> None:
    search = {**NARROW, "schedules": ["sequential"], "backends": ["alltoall"]}
    path = write(tmp_path, training(search=search, objective={"maximize": metric}))
    result = tuned(path, tmp_path / "run", capsys, 1000)
    every = [trial["metrics"][metric] for trial in result["trial_list"]]
    assert result["gain"]["metric"] == metric
    assert result["best"]["metrics"][metric] == max(every)
    assert len(set(every)) > 2


def test_an_impossible_limit_names_the_nearest_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, training(search=NARROW))
    code, told = refused(path, capsys, "--set", "objective.limits.step_s=1.0e-4")
    assert code == 1
    assert "nearest: TP2 PP2 DP2 EP4" in told
    assert "step_s" in told


def test_a_space_without_a_legal_plan_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, training(search=NARROW))
    code, told = refused(path, capsys, "--set", "training.memory.fraction=0.02")
    assert code == 1
    assert "out_of_memory" in told
    assert "nearest: TP2 PP2 DP2 EP4" in told


@pytest.mark.parametrize(
    ("setting", "where"),
    [
        ("search.capacity_factor=[2.0, 1.0]", "capacity_factor"),
        ("search.schedules=[two_batch]", "search.schedules"),
        ("search.redundant_experts=[8]", "search.redundant_experts"),
        ("search.axes={training.micro_batch: []}", "search.axes.training.micro_batch"),
        ("search.axes={training.nothing: [1]}", "search.axes.training.nothing"),
        ("placement={file: map.json}", "placement.file"),
        ("objective.slo.tpot_p99_ms=50", "objective"),
        ("objective={maximize: mfu, minimize: step_s}", "maximize or minimize"),
        ("training.micro_batch=0", "micro_batch"),
    ],
)
def test_keys_that_cannot_be_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, where: str
) -> None:
    code, told = refused(write(tmp_path, training(search=NARROW)), capsys, "--set", setting)
    assert code == 2
    assert where in told


def test_one_axis_asked_for_twice_is_refused() -> None:
    search = {"capacity_factor": [1.0, 2.0], "axes": {"policies.capacity.factor": [1.0]}}
    with pytest.raises(BadInput, match="same axis"):
        space_of(policies=CAPPED, search=search)


def test_other_dispatchers_are_tried_without_deepeps_posting_threads() -> None:
    host = {"layer_s": 1e-3, "exchange_s": 1e-4}
    changes = training(policies={"dispatch": {"backend": "deepep"}}, search=NARROW)
    changes["training"] = {**changes["training"], "host": host}
    scenario = Scenario.model_validate(changes)
    space, _, _ = training_space(scenario, SharedTraining())
    for plan in space.plans:
        applied = plan.apply(scenario).training
        assert applied is not None
        assert applied.host.layer_s == 1e-3
        assert applied.host.exchange_s == (1e-4 if plan.backend == "deepep" else 0.0)
    assert {plan.backend for plan in space.plans} == {"alltoall", "deepep"}
