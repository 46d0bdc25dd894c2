"""The search on a small scenario: the contract's keys, the run's files, resume, equal trials on any workers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from moesim.cli import run
from moesim.engine.deployment import groundwork
from moesim.spec.scenario import load_scenario
from placement.plans import baseline_plan
from placement.space import enumerate_space
from placement.tuner import BATCH
from tests.scenarios import printed, small, write

TRIALS = 14


def scenario(tmp_path: Path, **changes: Any) -> Path:
    data = small(search={"solvers": ["greedy", "contiguous"], "redundant_experts": [0, 8]})
    data["serving"]["workload"]["requests"] = 40
    data.update(changes)
    return write(tmp_path, data)


def tuned(path: Path, out: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["tune", str(path), "--trials", str(TRIALS), "--out", str(out), "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def tried(result: dict[str, Any]) -> list[str]:
    return [trial["label"] for trial in result["trial_list"]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What one undisturbed search finds, and its run folder; neither is to be changed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    path = scenario(tmp_path_factory.mktemp("scenario"))
    return printed(["tune", str(path), "--trials", str(TRIALS), "--out", str(out), "--json"]), out


def test_the_run_has_the_contracts_keys_and_files(whole: tuple[dict[str, Any], Path]) -> None:
    result, out = whole
    for key in ("best", "baseline", "gain", "verdict", "pareto", "trials", "space", "infeasible", "run"):
        assert key in result
    assert result["trials"] == TRIALS == len(set(tried(result)))
    assert result["verdict"]["text"]
    assert {one["claim"] for one in result["validation"]} >= {"serving_time", "exchange_time"}
    assert result["validation_text"].startswith("Not validated on hardware: serving time")
    assert result["best"]["meets_slo"]
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {"plan.yaml", "placement.json", "report.html", "timeline.json.gz", "result.json"} <= files
    assert any(name.startswith("sglang/") for name in files)
    assert any(name.startswith("trtllm/") for name in files)
    plan = yaml.safe_load((out / "plan.yaml").read_text())
    assert plan["verdict"] == result["verdict"]
    front = [
        (plan["metrics"]["output_tokens_per_s_per_gpu"], plan["metrics"]["tpot_s.p50"]) for plan in result["pareto"]
    ]
    assert front == sorted(front, key=lambda point: (-point[0], -point[1]))


def test_a_person_gets_a_table_and_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tune", str(scenario(tmp_path)), "--trials", "6", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    for wanted in ("best:", "baseline", "legal plans", "TPOT p50 ms", "Wrote"):
        assert wanted in printed


def test_the_plan_exports_again(tmp_path: Path, whole: tuple[dict[str, Any], Path]) -> None:
    _, out = whole
    assert run(["export", str(out / "plan.yaml"), "--engine", "sglang", "--out", str(tmp_path / "x")]) == 0
    again = json.loads(next((tmp_path / "x").glob("*.json")).read_text())
    first = json.loads(next((out / "sglang").glob("*.json")).read_text())
    assert again == first


def test_two_workers_try_the_same_plans_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: tuple[dict[str, Any], Path]
) -> None:
    one, _ = whole
    two = tuned(scenario(tmp_path), tmp_path / "two", capsys, "--workers", "2")
    assert tried(one) == tried(two)
    assert [trial["metrics"] for trial in one["trial_list"]] == [trial["metrics"] for trial in two["trial_list"]]
    assert one["gain"] == two["gain"]


@pytest.mark.parametrize("stored", [1, 5, BATCH + 1])
def test_kill_and_resume_lose_nothing(
    stored: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: tuple[dict[str, Any], Path]
) -> None:
    """Killed as soon as so many trials are stored, between batches or within one: the same trials as without."""
    path, out = scenario(tmp_path), tmp_path / "killed"
    undisturbed, _ = whole
    killing = (
        "import os, signal, sys, optuna\n"
        "add, kept = optuna.Study.add_trial, []\n"
        "def store(self, trial):\n"
        "    add(self, trial)\n"
        "    kept.extend([trial] if self.study_name == 'moesim' else [])\n"
        f"    len(kept) == {stored} and os.kill(os.getpid(), signal.SIGKILL)\n"
        "optuna.Study.add_trial = store\n"
        "from moesim.cli import run\n"
        "run(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", killing, "tune", str(path), "--trials", str(TRIALS), "--out", str(out)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    resumed = tuned(path, out, capsys, "--resume")
    assert resumed["run"]["resumed_trials"] == stored
    assert tried(resumed) == tried(undisturbed)
    assert resumed["best"]["label"] == undisturbed["best"]["label"]


def test_a_second_run_in_the_same_folder_needs_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = scenario(tmp_path)
    tuned(path, tmp_path / "run", capsys)
    assert run(["tune", str(path), "--trials", "3", "--out", str(tmp_path / "run")]) == 2
    assert "--resume" in capsys.readouterr().err
    again = tuned(path, tmp_path / "run", capsys, "--resume")
    assert again["run"]["resumed_trials"] == TRIALS
    other = scenario(tmp_path, seed=4)
    assert run(["tune", str(other), "--trials", "3", "--out", str(tmp_path / "run"), "--resume"]) == 2
    assert "another scenario" in capsys.readouterr().err


def test_resume_with_nothing_stored_starts_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuned(scenario(tmp_path), tmp_path / "run", capsys, "--resume")["trials"] == TRIALS


def test_a_small_space_is_evaluated_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tuned(scenario(tmp_path, search={"parallel": "fixed", "solvers": ["greedy"]}), tmp_path / "run", capsys)
    assert result["exhausted"]
    assert result["trials"] == result["space"] < TRIALS


def test_an_impossible_level_names_the_nearest_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = scenario(tmp_path, objective={"slo": {"tpot_p99_ms": 0.001}})
    assert run(["tune", str(path), "--trials", "4", "--out", str(tmp_path / "run")]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "nearest" in line


def test_where_nothing_fits_the_nearest_plan_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DeepSeek-V3 in FP8 on eight H100: 671 GB of weights, 640 GB of memory."""
    path = scenario(tmp_path, model="deepseek-ai/DeepSeek-V3", cluster={"system": "h100_sxm", "nodes": 1})
    arguments = ["tune", str(path), "--trials", "4", "--set", "precision.experts=fp8_block"]
    assert run([*arguments, "--set", "cost.extrapolate=allow", "--out", str(tmp_path / "run")]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "plans can run (out_of_memory" in line
    assert "nearest: " in line
    short = float(line.split("nearest: ")[1].split("% of a GPU's memory short")[0].rpartition(" ")[2])
    assert 5 <= short <= 60


def test_illegal_plans_are_counted_by_reason(tmp_path: Path) -> None:
    ground = groundwork(load_scenario(scenario(tmp_path, search={"redundant_experts": [0, 3, 8]})))
    space = enumerate_space(ground, ground.scenario)
    assert space.infeasible["slots_not_divisible"] > 0
    assert len(set(space.plans)) == len(space.plans)
    assert len({tuple(plan.params().values()) for plan in space.plans}) == len(space.plans) == space.size


def test_the_baseline_is_contiguous_without_redundancy(tmp_path: Path) -> None:
    ground = groundwork(load_scenario(scenario(tmp_path)))
    base = baseline_plan(ground, ground.scenario)
    assert (base.solver, base.redundant_experts, base.schedule) == ("contiguous", 0, "sequential")


@pytest.mark.parametrize("arguments", [["--trials", "0"], ["--trials", "2", "--workers", "0"]])
def test_bad_numbers_are_refused(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tune", str(scenario(tmp_path)), *arguments, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("storage", ["nonsense", "sqlite:////nonexistent/x.db"])
def test_a_storage_that_cannot_be_opened_is_one_line(
    storage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["tune", str(scenario(tmp_path)), "--trials", "2", "--storage", storage]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert storage in line


def test_a_storage_that_fails_in_the_middle_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: optuna.Study, trial: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(optuna.Study, "add_trial", full)
    assert run(["tune", str(scenario(tmp_path)), "--trials", "2", "--out", str(tmp_path / "run")]) == 1
    assert "--resume" in capsys.readouterr().err


def test_ray_is_named_as_a_missing_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    out = str(tmp_path / "run")
    assert run(["tune", str(scenario(tmp_path)), "--trials", "2", "--out", out, "--ray", "auto"]) == 3
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "pip install '.[ray]'" in line


@pytest.mark.parametrize(
    "search", [{"placement": "fixed"}, {"redundant_experts": [8]}, {"schedules": ["two_batch"], "solvers": ["greedy"]}]
)
def test_a_narrow_search_keeps_its_baseline(search: dict[str, Any], tmp_path: Path) -> None:
    ground = groundwork(load_scenario(scenario(tmp_path, search=search)))
    plans = enumerate_space(ground, ground.scenario).plans
    assert plans.count(baseline_plan(ground, ground.scenario)) == 1
    assert len(plans) > 1


def test_layouts_beyond_low_latencys_limit_are_counted(tmp_path: Path) -> None:
    policies = {"dispatch": {"backend": "deepep", "mode": "low_latency"}}
    data = scenario(tmp_path, policies=policies)
    text = data.read_text().replace("max_batch_tokens_per_dp_rank: 2048", "max_batch_tokens_per_dp_rank: 256")
    data.write_text(text)
    ground = groundwork(load_scenario(data))
    space = enumerate_space(ground, ground.scenario)
    assert space.infeasible["low_latency_limit"] > 0
    assert {plan.parallel.tp for plan in space.plans if plan.backend == "deepep"} == {2, 4, 8}
