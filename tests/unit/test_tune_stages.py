"""Pipeline stages in a search of serving plans: off by default, legal ones with `search.pp`, and what a plan gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moesim.cli import run
from moesim.engine.deployment import groundwork
from moesim.errors import BadInput
from moesim.spec.scenario import Scenario, SearchSpec, load_scenario
from placement.layouts import layouts, stages_to_try
from placement.space import Space, enumerate_space
from tests.scenarios import small, write
from tests.training_scenarios import training


def space(tmp_path: Path, **search: Any) -> Space:
    data = small(search={"solvers": ["contiguous"], "redundant_experts": [0]} | search)
    data["placement"] = {"solver": "contiguous", "redundant_experts": 0}
    ground = groundwork(load_scenario(write(tmp_path, data)))
    return enumerate_space(ground, ground.scenario)


def test_a_search_has_one_stage_unless_it_is_asked_for_more(tmp_path: Path) -> None:
    plain, auto = space(tmp_path), space(tmp_path, pp="auto")
    assert {plan.parallel.pp for plan in plain.plans} == {1}
    assert {plan.parallel.pp for plan in auto.plans} == {1, 2, 4, 8}
    assert set(plain.plans) < set(auto.plans)
    assert {plan.parallel.gpus * plan.parallel.pp for plan in plain.plans} <= {1, 2, 4, 8}
    assert all(8 % plan.parallel.gpus == 0 for plan in auto.plans)
    assert len({plan.layout for plan in auto.bases}) == len({(p.parallel, p.backend) for p in auto.bases})


def test_the_stages_of_a_search_can_be_listed(tmp_path: Path) -> None:
    assert {plan.parallel.pp for plan in space(tmp_path, pp=[4]).plans} == {1, 4}  # the scenario's own has one
    assert stages_to_try(SearchSpec(pp=(2, 2, 8)), 8, 16) == (2, 8)
    assert stages_to_try(SearchSpec(pp="auto"), 24, 61) == (1, 2, 4, 8)
    assert stages_to_try(SearchSpec(pp="auto"), 6, 61) == (1, 2)
    assert stages_to_try(SearchSpec(pp="auto"), 8, 3) == (1, 2)
    assert list(layouts(8, (3,))) == []


def test_training_searches_stages_by_itself() -> None:
    with pytest.raises(BadInput, match="a training search tries pipeline stages by itself"):
        Scenario.read(training(search={"pp": "auto"}), where="test")


def test_a_search_finds_a_plan_in_stages_and_it_can_be_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small(search={"pp": [2], "solvers": ["contiguous"], "redundant_experts": [0]}, parallel={"pp": 2, "ep": 1})
    data["policies"] = {"dispatch": {"backend": "allreduce"}}
    data["placement"] = {"solver": "contiguous", "redundant_experts": 0}
    data["serving"]["workload"] |= {"requests": 40}
    out = tmp_path / "run"
    assert (
        run(["tune", str(write(tmp_path, data)), "--trials", "6", "--out", str(out), "--json", "--workers", "1"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert {row["parallel"]["pp"] for row in found["trial_list"]} == {2}
    assert "PP2" in found["best"]["label"]
    assert run(["simulate", str(out / "plan.yaml"), "--json", "--draws", "0"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["plan"]["parallel"]["pp"] == 2
    assert "--pp-size 2" in (out / "sglang" / "launch.txt").read_text()
