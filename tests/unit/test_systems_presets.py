"""Named systems: presets of policies, their command, and how a scenario's own keys win over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moesim.cli import run
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.stepmodel import price_light_steps
from moesim.errors import BadInput
from moesim.spec.scenario import PoliciesSpec, Scenario, load_scenario
from moesim.systems.load import apply_system, load_system, systems
from tests.scenarios import small, write

SCENARIO = """
model: deepseek-ai/DeepSeek-V3
cluster: {system: h200_sxm, nodes: 4}
serving: {workload: {isl: 1000, osl: 100, requests: 10, arrivals: {concurrency: 4}}}
"""


def scenario(tmp_path: Path, more: str) -> Scenario:
    path = tmp_path / "s.yaml"
    path.write_text(SCENARIO + more)
    return load_scenario(path)


@pytest.mark.parametrize("name", sorted(systems()))
def test_each_writes_every_axis_and_a_source(name: str) -> None:
    system = load_system(name)
    written = set(system.policies.model_fields_set)
    assert set(PoliciesSpec.model_fields) - written <= {"overlap", "expert_cache"}  # what only some schedules need
    assert system.source
    assert system.title


# What each system that needs more than a plain serving scenario of DeepSeek-V3 over 8 GPUs runs on.
RUNS_ON: dict[str, dict[str, Any]] = {
    "tensor_parallel": {"parallel": {"tp": 8, "ep": 8}},
    "vllm_full_graphs": {"engine": {"name": "vllm"}},
    "mixtral_offloading": {"model": "mistralai/Mixtral-8x7B-v0.1", "parallel": {"tp": 1, "ep": 1}},
    "pre_gated_moe": {"model": "mistralai/Mixtral-8x7B-v0.1", "parallel": {"tp": 1, "ep": 1}},
}


@pytest.mark.parametrize("name", sorted(systems()))
def test_each_can_be_run(name: str, tmp_path: Path) -> None:
    data = small(
        model="deepseek-ai/DeepSeek-V3",
        precision={"dense": "fp8_block", "experts": "fp8_block"},
        placement={"solver": "contiguous"},
        system=name,
    )
    scenario = load_scenario(write(tmp_path, data | RUNS_ON.get(name, {})))
    deployment = resolve(groundwork(scenario))
    assert deployment.setup.policies == load_system(name).policies
    assert set(price_light_steps(deployment)) == {"decode", "prefill"}


def test_unknown_system_lists_the_names() -> None:
    with pytest.raises(BadInput, match=r"unknown system 'sglang_large'.*did you mean sglang_large_ep"):
        load_system("sglang_large")


def test_a_scenario_takes_the_policies_of_its_system(tmp_path: Path) -> None:
    applied = apply_system(scenario(tmp_path, "system: vllm_allgather\n"))
    assert applied.policies.dispatch.backend == "allgather_reducescatter"
    assert applied.system is None
    assert apply_system(applied) == applied


def test_its_own_keys_win(tmp_path: Path) -> None:
    more = "system: sglang_large_ep\npolicies: {schedule: sequential, dispatch: {mode: normal}}\n"
    policies = apply_system(scenario(tmp_path, more)).policies
    assert policies.schedule == "sequential"
    assert (policies.dispatch.backend, policies.dispatch.mode, policies.dispatch.replica) == (
        "deepep",
        "normal",
        "local_first",
    )


def test_an_unknown_system_in_a_scenario_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="system: unknown system"):
        apply_system(scenario(tmp_path, "system: none_such\n"))


def test_the_command_lists_and_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["systems", "list"]) == 0
    assert "trtllm_wide_ep" in capsys.readouterr().out
    assert run(["systems", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [item["name"] for item in listed["systems"]] == list(systems())
    assert run(["systems", "show", "sglang_large_ep", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["policies"]["dispatch"]["backend"] == "deepep"


def test_what_show_prints_is_what_a_scenario_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["systems", "show", "trtllm_wide_ep"]) == 0
    printed = capsys.readouterr().out
    assert scenario(tmp_path, printed).policies == load_system("trtllm_wide_ep").policies


def test_showing_an_unknown_system_exits_2_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["systems", "show", "nothing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
