"""The scenario file: defaults, overrides, one-line faults, paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesim.errors import BadInput
from moesim.routing.readers import read_loads
from moesim.spec.hf import load_model
from moesim.spec.placement_file import read_placement
from moesim.spec.scenario import Scenario, apply_override, load_scenario
from tests.scenarios import DEMO, small, write

SECTION_5 = """
schema_version: 1
model: deepseek-ai/DeepSeek-V3
cluster: {system: h200_sxm, nodes: 4, gpus_per_node: 8}
engine: {name: sglang, version: "0.5.14"}
precision: {dense: fp8_block, experts: fp8_block, activations: bf16, kv_cache: bf16, dispatch: fp8, combine: bf16}
cost: {source: store, profiles: [default], extrapolate: refuse}
routing:
  loads: [{file: a.json, phase: prefill, weight: 1.0}, {file: b.json, phase: decode, weight: 1.0}]
  holdout: {by: file, fraction: 0.5}
parallel: {tp: 1, pp: 1, cp: 1, attention_dp: 32, ep: 32, expert_tp: 1, rank_order: [tp, cp, dp, pp]}
placement: {solver: robust, redundant_experts: 32}
policies:
  gate: model
  capacity: {rule: dropless, factor: null, drop: null, pad: null}
  dispatch: {backend: deepep, mode: auto, replica: local_first}
  schedule: two_batch
  storage: resident
system: null
serving:
  workload: {isl: 4000, osl: 500, requests: 2000, arrivals: {poisson: {requests_per_s: 20}}}
  batching: {max_batch_tokens_per_dp_rank: 16384, max_running_requests_per_dp_rank: 256, chunked_prefill: true,
             prefix_cache: false, cuda_graph_sizes: engine}
  speculative: null
  memory: {fraction: 0.9, reserved_bytes: 0}
  roles: null
objective: {maximize: output_tokens_per_s_per_gpu, slo: {ttft_p99_ms: 2000, tpot_p99_ms: 50}}
search: {parallel: auto, placement: auto, capacity_factor: [1.0, 2.0], sampler: tpe}
seed: 0
"""


def test_the_contracts_example_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(SECTION_5)
    scenario = load_scenario(path)
    assert scenario.parallel is not None
    assert scenario.parallel.gpus == 32
    assert scenario.routing.loads is not None
    assert scenario.routing.loads[0].file == tmp_path / "a.json"
    assert scenario.objective.slo.limits() == {("ttft_s", "p99"): 2.0, ("tpot_s", "p99"): 0.05}


def test_only_model_cluster_and_workload_are_needed(tmp_path: Path) -> None:
    data = {name: small()[name] for name in ("model", "cluster", "serving")}
    scenario = load_scenario(write(tmp_path, data))
    assert scenario.placement.solver == "contiguous"
    assert scenario.cost.extrapolate == "refuse"


def test_the_demo_writes_out_what_scripts_look_for() -> None:
    scenario = load_scenario(DEMO)
    assert scenario.serving is not None
    workload = scenario.serving.workload
    assert (workload.isl, workload.osl) == (2000, 256)
    assert workload.requests
    assert workload.arrivals is not None
    assert workload.arrivals.poisson is not None
    assert scenario.parallel is not None
    assert scenario.serving.roles is None
    assert scenario.objective.slo.limits()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "mapping"),
        ("- a\n- b", "mapping"),
        ("model: [", "YAML"),
        ("model: !!python/object:os.system x", "YAML"),
        ("model: x\ncluster: {system: h200_sxm}", "serving"),
        ("schema_version: 2\nmodel: x\ncluster: {system: h200_sxm}\nserving: {}", "schema_version"),
        ("model: x\ncluster: {sytem: h200_sxm}\nserving: {workload: {}}", "cluster"),
        ("model: x\ncluster: {system: a}\nserving: {workload: {isl: 1, osl: 1}}", "workload"),
        ("model: x\ncluster: {system: a}\nserving: {workload: {isl: .nan, osl: 1}}", "isl"),
    ],
)
def test_faults_name_the_place(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        load_scenario(path)
    assert told in caught.value.line()
    assert str(path) in caught.value.line()
    assert "\n" not in caught.value.line()


def test_a_plan_is_told_from_a_scenario(tmp_path: Path) -> None:
    plan = {"format": "moesim-plan", "schema_version": 1, "placement": "placement.json", "scenario": small()}
    assert load_scenario(write(tmp_path, plan), ("seed=3",)).seed == 3  # it holds one
    with pytest.raises(BadInput, match="plan of `moesim tune`"):
        load_scenario(write(tmp_path, {**plan, "scenario": "scenario.yaml"}))


def test_unknown_keys_name_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        load_scenario(write(tmp_path, small(placement={"solvr": "greedy"})))
    assert "solver" in caught.value.line()


def test_overrides_replace_scalars_with_mappings() -> None:
    data: dict[str, object] = {"a": 1}
    apply_override(data, "a.b=[1, 2]")
    apply_override(data, "c=null")
    assert data == {"a": {"b": [1, 2]}, "c": None}


def test_the_scenario_survives_a_round_trip(tmp_path: Path) -> None:
    scenario = load_scenario(write(tmp_path, small()))
    assert Scenario.model_validate(scenario.model_dump(mode="json")) == scenario


@pytest.mark.parametrize("number", [2**53 + 1, -(10**30), 10**400])
def test_numbers_that_no_computation_bears_are_named(number: int) -> None:
    data = small()
    data["serving"]["workload"]["isl"] = number
    with pytest.raises(BadInput, match=r"serving\.workload\.isl: this whole number is too large"):
        Scenario.read(data, where="test")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "x" * 5000 + ".json", "a\0b.json"])
def test_names_that_no_file_can_have_are_bad_input(name: str) -> None:
    with pytest.raises(BadInput):
        load_model(name)
    with pytest.raises(BadInput):
        read_loads(Path(name))
    with pytest.raises(BadInput):
        read_placement(Path(name))
