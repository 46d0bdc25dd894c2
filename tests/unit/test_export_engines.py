"""Maps as engines load them: round trips, each engine's own rules, and the flags with their conversions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moesim.errors import BadInput, Infeasible
from moesim.spec.maps import sglang as sglang_map
from moesim.spec.maps import trtllm as trtllm_map
from moesim.spec.plan import ExpertPlacement, PlacementRequest
from moesim.spec.scenario import Scenario
from placement.export import megatron, sglang, trtllm, vllm, vllm_ascend
from placement.export.engines import export_placement, write_map
from placement.export.instance import Instances, instances_of
from placement.problem import solve


@pytest.fixture(scope="module")
def placement() -> ExpertPlacement:
    """Layers 3 to 5 of 6 are MoE; 16 experts, 20 slots, 4 ranks."""
    loads = np.random.default_rng(0).lognormal(0.0, 1.0, (1, 3, 16))
    loads /= loads.sum(axis=-1, keepdims=True)
    request = PlacementRequest(loads, np.ones(1), np.arange(3, 6), 6, slots=20, ranks=4)
    return solve(request, "greedy").placement


def scenario(**more: Any) -> Scenario:
    data: dict[str, Any] = {
        "model": "deepseek-ai/DeepSeek-V3",
        "cluster": {"system": "h200_sxm", "nodes": 2, "gpus_per_node": 8},
        "parallel": {"tp": 2, "attention_dp": 8, "ep": 16},
        "policies": {"schedule": "two_batch", "dispatch": {"replica": "equal"}},
        "serving": {
            "workload": {"isl": 100, "osl": 10, "requests": 1, "arrivals": {"concurrency": 1}},
            "batching": {"max_batch_tokens_per_dp_rank": 1024, "max_running_requests_per_dp_rank": 64},
        },
    }
    return Scenario.read({**data, **more}, where="test")


def test_sglang_takes_one_key_and_a_legal_row_for_every_absolute_layer(placement: ExpertPlacement) -> None:
    data = json.loads(sglang.render(placement))
    assert list(data) == ["physical_to_logical_map"]
    rows = data["physical_to_logical_map"]
    assert len(rows) == 6
    # Dense layers hold what SGLang's trivial location holds: slot mod experts.
    assert rows[0] == rows[2] == [slot % 16 for slot in range(20)]
    assert rows[3:] == placement.physical_to_logical.tolist()


def test_trtllm_takes_three_keys_and_the_moe_layers(placement: ExpertPlacement) -> None:
    data = yaml.safe_load(trtllm.render(placement))
    assert set(data) == {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}
    assert data["layer_updates_per_iter"] == 0
    assert list(data["initial_global_assignments"]) == [3, 4, 5]


def test_vllm_ascend_counts_moe_layers_and_devices_from_0(placement: ExpertPlacement) -> None:
    data = json.loads(vllm_ascend.render(placement))
    assert data["moe_layer_count"] == 3
    assert [layer["layer_id"] for layer in data["layer_list"]] == [0, 1, 2]  # relative to the MoE layers
    assert data["layer_list"][0]["device_list"][1]["device_id"] == 1


def test_vllm_ascend_refuses_two_replicas_on_one_device(tmp_path: Path) -> None:
    twice = ExpertPlacement(np.asarray([[0, 0, 1, 2]]), np.arange(1), experts=3, ranks=2, absolute_layers=1)
    with pytest.raises(Infeasible) as caught:
        vllm_ascend.write(twice, tmp_path / "map.json")
    assert caught.value.reason == "duplicates_on_one_gpu"
    assert not (tmp_path / "map.json").exists()
    sglang.write(twice, tmp_path / "map.json")  # SGLang can hold it


def test_vllm_names_its_version_gate(placement: ExpertPlacement, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="34297 and 49572"):
        write_map(placement, "vllm", tmp_path / "map.json")


SGLANG: list[tuple[Any, str]] = [
    ([], "physical_to_logical_map"),
    ({}, "is missing"),
    ({"physical_to_logical_map": [[0, 1]], "layers": 1}, "takes no key 'layers'"),
    ({"physical_to_logical_map": [[0, 1], [0]]}, "row 1"),
    ({"physical_to_logical_map": [[0, 1, 0]]}, "do not divide"),
    ({"physical_to_logical_map": [[0, 2]]}, "expert 2, there are 2"),
    ({"physical_to_logical_map": [[0]]}, "do not divide"),
    ({"physical_to_logical_map": [[0, 0]]}, "no slot for expert 1"),
    ({"physical_to_logical_map": [[0, 1.0]]}, "1.0"),
    ({"physical_to_logical_map": [[0, True]]}, "True"),
    ({"physical_to_logical_map": [[0, -1]]}, "-1"),
]


@pytest.mark.parametrize(("data", "text"), SGLANG)
def test_sglang_rules(data: Any, text: str) -> None:
    with pytest.raises(BadInput, match=text):
        sglang_map.check(
            data, experts=2, ranks=2, layers=len(data.get("physical_to_logical_map", [])) if data else 0, where="map"
        )


TRTLLM: list[tuple[Any, str]] = [
    (3, "not a mapping"),
    ({"num_slots": 2, "slots": 2}, "takes no key 'slots'"),
    ({"num_slots": "2"}, "num_slots"),
    ({"num_slots": 2}, "initial_global_assignments"),
    ({"num_slots": 2, "initial_global_assignments": {"3": [0, 1]}}, "a layer"),
    ({"num_slots": 4, "initial_global_assignments": {3: [0, 1]}}, "2 assignments for num_slots 4"),
    ({"num_slots": 3, "initial_global_assignments": {3: [0, 1, 0]}}, "do not divide"),
    ({"num_slots": 2, "initial_global_assignments": {3: [1, 1]}}, "layer 3 has no slot for expert 0"),
    ({"num_slots": 2, "initial_global_assignments": {3: [0, 9]}}, "expert 9"),
    ({"num_slots": 2, "initial_global_assignments": {3: [0, 1]}, "layer_updates_per_iter": -1}, "layer_updates"),
]


@pytest.mark.parametrize(("data", "text"), TRTLLM)
def test_trtllm_rules(data: Any, text: str) -> None:
    with pytest.raises(BadInput, match=text):
        trtllm_map.check(data, experts=2, ranks=2, where="map")


def test_drafts_are_told_to_every_engine(placement: ExpertPlacement) -> None:
    serving = {
        **scenario().model_dump(mode="json")["serving"],
        "speculative": {"method": "mtp", "draft_tokens": 2, "acceptance": 0.6},
    }
    plan = scenario(serving=serving, parallel={"attention_dp": 16, "ep": 16})
    flags = sglang.launch(placement, plan)
    for wanted in ("--speculative-num-steps 2", "--speculative-eagle-topk 1", "--speculative-num-draft-tokens 3"):
        assert wanted in flags
    (line,) = [line for line in vllm.launch(placement, plan) if line.startswith("--speculative-config")]
    assert json.loads(line.split("'")[1]) == {"method": "mtp", "num_speculative_tokens": 2}
    drafts = yaml.safe_load(trtllm.options(placement, plan))["speculative_config"]
    assert drafts == {"decoding_type": "MTP", "num_nextn_predict_layers": 2}
    plain = (*sglang.launch(placement, scenario()), *vllm.launch(placement, scenario()))
    assert not any("speculative" in line for line in plain)


def test_sglang_flags_multiply_the_limits_of_one_attention_rank(placement: ExpertPlacement) -> None:
    lines = sglang.launch(placement, scenario())
    # 8 attention-DP ranks of TP 2: SGLang's tp counts all 16 GPUs, and it divides both limits by dp.
    for wanted in (
        "--tp-size 16",
        "--dp-size 8",
        "--enable-dp-attention",
        "--ep-num-redundant-experts 4",
        "--init-expert-location expert_location.json",
        "--ep-dispatch-algorithm dynamic",
        "--moe-a2a-backend deepep",
        "--deepep-mode auto",
        "--enable-two-batch-overlap",
        f"--chunked-prefill-size {1024 * 8}",
        f"--max-running-requests {64 * 8}",
        "--nnodes 2",
    ):
        assert wanted in lines
    local = sglang.launch(placement, scenario(policies={"dispatch": {"replica": "local_first"}}))
    assert "--ep-dispatch-algorithm static" in local


def test_an_instance_is_started_on_its_own_nodes_only(placement: ExpertPlacement) -> None:
    """Sixteen GPUs on two nodes of a cluster of four: two instances, of two nodes each."""
    four = scenario(cluster={"system": "h200_sxm", "nodes": 4})
    assert instances_of(placement, four) == Instances(2, 16, 2)
    assert "2 times" in instances_of(placement, four).note()
    assert "--nnodes 2" in sglang.launch(placement, four)
    one_node = scenario(parallel={"tp": 2, "attention_dp": 4, "ep": 8})
    assert instances_of(placement, one_node).count == 2
    assert not any("--nnodes" in line for line in sglang.launch(placement, one_node))


@pytest.mark.parametrize("of_what", ["all", "static", "free"])
def test_each_engine_is_told_the_fraction_that_it_means(placement: ExpertPlacement, of_what: str) -> None:
    """The flags give every engine the plan's own KV cache; a figure that means the same is handed over as it is."""
    serving = {**scenario().model_dump(mode="json")["serving"], "memory": {"fraction": 0.85, "fraction_of": of_what}}
    plan = scenario(serving=serving, parallel={"attention_dp": 16, "ep": 16})
    flags = (*sglang.launch(placement, plan), *vllm.launch(placement, plan))
    told = {
        "static": next(line for line in flags if line.startswith("--mem-fraction-static")).split()[1],
        "all": next(line for line in flags if line.startswith("--gpu-memory-utilization")).split()[1],
        "free": yaml.safe_load(trtllm.options(placement, plan))["kv_cache_config"]["free_gpu_memory_fraction"],
    }
    assert float(told[of_what]) == pytest.approx(0.85)
    shares = {name: float(value) for name, value in told.items()}
    assert shares["free"] < shares["static"] < shares["all"] or of_what == "free"
    assert len({round(value, 3) for value in shares.values()}) == 3


def test_other_engines_keep_the_limits_of_one_attention_rank(placement: ExpertPlacement) -> None:
    lines = vllm.launch(placement, scenario())
    for wanted in ("--tensor-parallel-size 2", "--data-parallel-size 8", "--enable-expert-parallel", "--enable-eplb"):
        assert wanted in lines
    assert "--max-num-batched-tokens 1024" in lines
    assert "--max-num-seqs 64" in lines
    config = next(line for line in lines if line.startswith("--eplb-config"))
    assert json.loads(config.split("'")[1])["num_redundant_experts"] == 4
    options = yaml.safe_load(trtllm.options(placement, scenario(parallel={"attention_dp": 16, "ep": 16})))
    assert (options["tensor_parallel_size"], options["enable_attention_dp"]) == (16, True)
    assert (options["max_batch_size"], options["max_num_tokens"]) == (64, 1024)
    assert options["moe_config"] == {"load_balancer": "moe_load_balancer.yaml"}


def test_split_contexts_are_told_to_the_engines_that_have_them(placement: ExpertPlacement, tmp_path: Path) -> None:
    """Only under latent attention in SGLang; TensorRT-LLM's Helix takes GPUs of its own."""
    plain = {"policies": {"dispatch": {"backend": "allgather_reducescatter"}}}
    split = scenario(parallel={"tp": 8, "attention_dp": 2, "ep": 16, "decode_cp": 4}, **plain)
    for engine, flag in (("vllm", "--decode-context-parallel-size 4"), ("sglang", "--dcp-size 4")):
        files = export_placement(placement, engine, tmp_path / engine, split)
        assert flag in files[-1].read_text()
    assert "--decode-context-parallel-size 4" in vllm_ascend.launch(placement, split)
    whole = scenario(parallel={"tp": 8, "attention_dp": 2, "ep": 16}, **plain)
    assert not any(
        "context" in line or "dcp" in line
        for line in (*vllm.launch(placement, whole), *sglang.launch(placement, whole))
    )
    grouped = scenario(
        model="Qwen/Qwen3-235B-A22B", parallel={"tp": 8, "attention_dp": 2, "ep": 16, "decode_cp": 2}, **plain
    )
    assert "--decode-context-parallel-size 2" in vllm.launch(placement, grouped)
    for engine, plan, said in (
        ("trtllm", split, "trtllm cannot split contexts over GPUs of a TP group"),
        ("sglang", grouped, "sglang splits the contexts of latent attention only"),
    ):
        with pytest.raises(Infeasible, match=said):
            export_placement(placement, engine, tmp_path / "refused", plan)
    assert not (tmp_path / "refused").exists()


def test_stages_are_told_to_every_engine(placement: ExpertPlacement) -> None:
    """Stages of 8 GPUs on two nodes; an engine that would split the 61 layers otherwise is told how the plan does."""
    stages = scenario(engine={"name": "vllm", "version": "1"}, parallel={"tp": 8, "pp": 2, "ep": 8})
    assert instances_of(placement, stages) == Instances(1, 16, 2)
    lines = vllm.launch(placement, stages)
    assert "--pipeline-parallel-size 2" in lines
    assert "--max-num-seqs 64" in lines  # of both batches together
    assert not any("PARTITION" in line for line in lines)
    lines = sglang.launch(placement, stages)
    assert lines[0].startswith("SGLANG_PP_LAYER_PARTITION=31,30 ")
    assert "--pp-size 2" in lines
    assert "--tp-size 8" in lines
    options = yaml.safe_load(trtllm.options(plain(8), stages))
    assert options["pipeline_parallel_size"] == 2
    assert options["max_batch_size"] == 32  # of one batch
    assert "pp_partition" not in options


def test_how_batches_follow_each_other_is_told(placement: ExpertPlacement) -> None:
    serving = scenario().model_dump(mode="json")["serving"]
    pipeline = {"layers": [30, 31], "batches": 3, "running_requests_per_dp_rank": 20}
    stages = scenario(parallel={"tp": 8, "pp": 2, "ep": 8}, serving=serving | {"pipeline": pipeline})
    lines = sglang.launch(placement, stages)
    assert "--pp-max-micro-batch-size 20" in lines
    assert "--pp-async-batch-depth 1" in lines
    assert not any("PARTITION" in line for line in lines)  # SGLang's own split
    assert vllm.launch(placement, stages)[0].startswith("VLLM_PP_LAYER_PARTITION=30,31 vllm serve")
    options = yaml.safe_load(trtllm.options(plain(8), stages))
    assert (options["pp_partition"], options["max_batch_size"]) == ([30, 31], 20)


def plain(ranks: int) -> ExpertPlacement:
    """Sixteen experts in order, which TensorRT-LLM needs no map for."""
    loads = np.full((1, 3, 16), 1 / 16)
    return solve(PlacementRequest(loads, np.ones(1), np.arange(3, 6), 6, slots=16, ranks=ranks), "contiguous").placement


def test_trtllm_refuses_a_layout_that_it_does_not_have(placement: ExpertPlacement, tmp_path: Path) -> None:
    with pytest.raises(Infeasible, match="TP 2 x DP 8"):
        export_placement(placement, "trtllm", tmp_path / "trtllm", scenario())
    assert not (tmp_path / "trtllm").exists()


@pytest.mark.parametrize(
    ("engine", "policies", "said"),
    [
        ("sglang", {"schedule": "pipeline"}, "sglang has no schedule pipeline.*plan with sequential or two_batch"),
        ("sglang", {"schedule": "whole_graph"}, "sglang has no schedule whole_graph"),
        ("vllm", {"schedule": "shortcut"}, "vllm has no schedule shortcut"),
        ("vllm", {"storage": "offload"}, "vllm has no flags.*storage offload"),
    ],
)
def test_a_schedule_or_storage_that_an_engine_lacks_is_refused(
    placement: ExpertPlacement, tmp_path: Path, engine: str, policies: dict[str, str], said: str
) -> None:
    with pytest.raises(Infeasible, match=said):
        export_placement(placement, engine, tmp_path / "out", scenario(policies=policies))
    assert not (tmp_path / "out").exists()


def test_vllm_captures_whole_steps(placement: ExpertPlacement) -> None:
    policies = {"schedule": "whole_graph", "dispatch": {"backend": "allgather_reducescatter"}}
    lines = vllm.launch(placement, scenario(policies=policies))
    (line,) = [line for line in lines if line.startswith("--compilation-config")]
    assert json.loads(line.split("'")[1]) == {"cudagraph_mode": "FULL"}


def test_megatron_flags() -> None:
    plain = ExpertPlacement(np.arange(4)[None, :], np.arange(1), experts=4, ranks=2, absolute_layers=1)
    training = {"sequence_length": 4096, "micro_batch": 1, "global_batch": 64}
    policies = {"capacity": {"rule": "megatron", "factor": 1.25, "drop": "position", "pad": True}}
    parallel = {"tp": 2, "pp": 2, "attention_dp": 4, "ep": 4, "expert_tp": 2}
    lines = megatron.launch(plain, scenario(serving=None, training=training, policies=policies, parallel=parallel))
    for wanted in (
        "--tensor-model-parallel-size 2",
        "--pipeline-model-parallel-size 2",
        "--expert-tensor-parallel-size 2",
        "--moe-token-dispatcher-type flex",
        "--moe-enable-deepep",
        "--moe-expert-capacity-factor 1.25",
        "--moe-token-drop-policy position",
        "--moe-pad-expert-input-to-capacity",
        "--seq-length 4096",
    ):
        assert wanted in lines


def test_launch_text_is_one_shell_command(placement: ExpertPlacement, tmp_path: Path) -> None:
    *_, launch = export_placement(placement, "sglang", tmp_path, scenario())
    text = launch.read_text()
    notes = [line for line in text.splitlines() if line.startswith("# ")]
    assert notes[0] == "# run in this folder"
    assert "2 nodes" in notes[1]
    command = text.removeprefix("\n".join(notes) + "\n")
    limit = "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK=128"
    assert command.startswith(f"{limit} python -m sglang.launch_server \\\n  --model-path deepseek-ai/DeepSeek-V3 \\\n")
    assert not text.rstrip().endswith("\\")
