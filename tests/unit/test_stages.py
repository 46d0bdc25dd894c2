"""Pipeline stages of a serving plan: layers, memory, times by all three fidelities, what is refused, what is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli import run
from moesim.engine import des, maxplus
from moesim.engine.batch_rules import flow_of
from moesim.engine.batcher import Plan, new_plan
from moesim.engine.critical import critical_path
from moesim.engine.deployment import Deployment, groundwork, resolve
from moesim.engine.memory import weights
from moesim.engine.speculative import verified
from moesim.engine.stepmodel import ExactModel, StepModel, batch_of_plan
from moesim.errors import BadInput, Infeasible
from moesim.graph.stages import split_layers
from moesim.spec.hf import load_model
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import PoliciesSpec, PrecisionSpec, load_scenario
from tests.scenarios import small, write

DP4 = {"attention_dp": 4, "ep": 4}
TP4 = {"tp": 4, "ep": 4}


def deployment(tmp_path: Path, **changes: Any) -> Deployment:
    data = small(parallel=DP4 | {"pp": 2})
    data["placement"] = {"solver": "contiguous", "redundant_experts": 0}
    serving = changes.pop("serving", {})
    data.update(changes)
    data["serving"] = data["serving"] | serving
    return resolve(groundwork(load_scenario(write(tmp_path, data))))


def planned(model: StepModel, decode: int, prompts: int = 0) -> Plan:
    ranks = model.deployment.setup.parallel.attention_dp
    plan = new_plan(ranks, model.limits.max_running)
    plan.decode_seqs[:], plan.decode_kv[:] = decode, decode * 250.0
    plan.prefill_seqs[:], plan.prefill_tokens[:] = prompts, prompts * 200
    return plan


@pytest.mark.parametrize(
    ("engine", "layers", "stages", "expected"),
    [
        ("vllm", 61, 2, [31, 30]),
        ("vllm", 61, 4, [15, 15, 16, 15]),
        ("vllm", 94, 4, [23, 24, 24, 23]),
        ("sglang", 61, 2, [30, 31]),
        ("sglang", 94, 4, [23, 23, 24, 24]),
        ("trtllm", 94, 4, [24, 24, 23, 23]),
        ("moesim", 48, 4, [12, 12, 12, 12]),
    ],
)
def test_layers_are_split_as_the_engine_does(engine: str, layers: int, stages: int, expected: list[int]) -> None:
    found = split_layers(layers, stages, engine)
    assert [len(held) for held in found] == expected
    assert [layer for held in found for layer in held] == list(range(layers))


def test_a_given_split_is_kept_and_a_wrong_one_refused() -> None:
    assert split_layers(16, 2, "vllm", (10, 6)) == (range(10), range(10, 16))
    with pytest.raises(BadInput, match="list 2 numbers that sum to 16"):
        split_layers(16, 2, "vllm", (10, 7))


@pytest.mark.parametrize("name", ["deepseek-ai/DeepSeek-V3", "Qwen/Qwen3-235B-A22B", "allenai/OLMoE-1B-7B-0924"])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_all_stages_together_hold_the_model_once(name: str, stages: int) -> None:
    model, parallel, precision = load_model(name), ParallelSpec(tp=4, ep=4), PrecisionSpec()
    slots = model.moe.experts // 4
    given = (model, parallel, precision, slots, PoliciesSpec())
    parts = [weights(*given, layers=held) for held in split_layers(model.layers, stages, "vllm")]
    for kind, whole in weights(*given).items():
        held = sum(part[kind] for part in parts)
        twice = kind == "weights_embeddings" and model.tied_embeddings
        assert held == pytest.approx(whole * (2 if twice else 1))


def test_the_stage_with_the_least_room_binds_the_cache(tmp_path: Path) -> None:
    found = deployment(tmp_path, serving={"pipeline": {"layers": [11, 5]}}).memory
    assert [len(one.layers) for one in found.stages] == [11, 5]
    first, second = found.stages
    assert found.kv_capacity_tokens == first.kv_capacity_tokens < second.kv_capacity_tokens
    assert first.kv_bytes_per_token / second.kv_bytes_per_token == pytest.approx(11 / 5)
    assert sum(found.items.values()) == pytest.approx(found.limit_bytes)
    assert "stage_inputs" in second.items
    assert "stage_inputs" not in first.items
    assert {name: size for name, size in found.items.items() if name != "kv_cache"} == first.items


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize(("decode", "prompts"), [(16, 0), (0, 2)])
def test_stages_of_the_table_add_up_to_the_whole_model(stages: int, decode: int, prompts: int, tmp_path: Path) -> None:
    """The same ranks in one stage hold all layers: what stages take together, only their transfers come on top."""
    one = StepModel(deployment(tmp_path, parallel={"attention_dp": 2, "ep": 2}), seed=0)
    several = StepModel(deployment(tmp_path, parallel={"attention_dp": 2, "ep": 2, "pp": stages}), seed=0)
    plan = planned(one, decode, prompts)
    times = several.base.stages(plan)
    assert len(times.stages_s) == stages
    assert times.host_s + sum(times.stages_s) == pytest.approx(one.base(plan), rel=1e-12)
    assert several.base(plan) == times.alone_s
    rows = float(several.graphs.padded(decode)) if decode else 200.0 * prompts
    assert times.transfers_s == pytest.approx([2e-6 + rows * 2048 * 2 * 2 / 370e9] * (stages - 1))


@pytest.mark.parametrize("parallel", [DP4, TP4])
@pytest.mark.parametrize("schedule", ["sequential", "two_batch"])
def test_executors_agree_and_stages_follow_each_other(parallel: dict[str, int], schedule: str, tmp_path: Path) -> None:
    backend = "deepep" if parallel is DP4 else "allgather_reducescatter"
    policies = {"schedule": schedule, "dispatch": {"backend": backend}}
    model = StepModel(deployment(tmp_path, parallel=parallel | {"pp": 2}, policies=policies), seed=0)
    plan = planned(model, 32)
    exact = ExactModel(model, "maxplus")
    priced = exact.price(batch_of_plan(model, plan), "decode")
    found = []
    for graph, _ in exact.stage_graphs(priced):
        fast, slow = maxplus.run(graph), des.run(graph, step=0, sharing=schedule == "sequential")
        if schedule == "sequential":
            assert slow.step_s == pytest.approx(fast.step_s, rel=1e-9)
        found.append(float(fast.step_s[0]))
    sent = [float(one[0, 0]) for one in exact.transfers(priced)]
    whole, _ = exact.graph(priced)
    assert whole.ranks == 8
    times = maxplus.run(whole, timeline=True)
    assert float(times.step_s[0]) == pytest.approx(sum(found) + sum(sent), rel=1e-12)
    if schedule == "sequential":
        assert des.run(whole, step=0, sharing=True).step_s == pytest.approx(times.step_s, rel=1e-9)
    path = critical_path(whole, times).by_operation_s(whole)
    assert sum(path.values()) == pytest.approx(float(times.step_s[0]))
    assert path["pipeline_transfer"] >= sum(sent) * (1 - 1e-9)
    assert (times.compute_busy_s[0] > 0).all()


def test_the_table_is_near_the_executors(tmp_path: Path) -> None:
    model = StepModel(deployment(tmp_path), seed=0)
    plan = planned(model, 32)
    exact = ExactModel(model, "maxplus")
    drawn = [exact.stages(plan) for _ in range(8)]
    table = model.base.stages(plan)
    for stage, seconds in enumerate(table.stages_s):
        assert seconds == pytest.approx(np.mean([one.stages_s[stage] for one in drawn]), rel=0.03)
    assert table.transfers_s == pytest.approx(drawn[0].transfers_s)


def test_a_group_gathers_what_its_ranks_received_a_share_of(tmp_path: Path) -> None:
    """vLLM and SGLang scatter what they send over the TP group; TensorRT-LLM sends all of it from each rank."""
    parallel, policies = TP4 | {"pp": 2}, {"dispatch": {"backend": "allreduce"}}
    sent = {}
    for name in ("vllm", "trtllm"):
        model = StepModel(
            deployment(tmp_path, engine={"name": name, "version": "1"}, parallel=parallel, policies=policies), seed=0
        )
        priced = ExactModel(model, "maxplus").price(batch_of_plan(model, planned(model, 32)), "decode")[0]
        sent[name] = float(priced.transfer.seconds()[0, 0, 0]) - 2e-6, bool(priced.arrival.estimates)
    assert sent["trtllm"][0] == pytest.approx(4 * sent["vllm"][0])
    assert (sent["vllm"][1], sent["trtllm"][1]) == (True, False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel": {"attention_dp": 4, "ep": 8, "cp": 2}}, "over GPUs of its own is not simulated in serving"),
        ({"parallel": DP4 | {"pp": 2, "rank_order": ["pp", "tp", "cp", "dp"]}}, "put pp last"),
        (
            {
                "parallel": {"pp": 32},
                "cluster": {"system": "h200_sxm", "nodes": 4},
                "policies": {"dispatch": {"backend": "allreduce"}},
            },
            "16 layers cannot fill 32 stages",
        ),
        (
            {
                "parallel": {"tp": 2, "attention_dp": 4, "ep": 8, "pp": 2},
                "cluster": {"system": "h200_sxm", "nodes": 2},
                "engine": {"name": "vllm"},
                "policies": {"dispatch": {"backend": "allgather_reducescatter"}},
            },
            "use attention_dp 1, tp 8, or an instance of one node",
        ),
        ({"serving": {"pipeline": {"layers": [8, 9]}}}, "list 2 numbers that sum to 16"),
        ({"parallel": DP4, "serving": {"pipeline": {"batches": 2}}}, "serving.pipeline: one stage has no pipeline"),
        (
            {"serving": {"roles": {"prefill": {"gpus": 4, "pipeline": {"batches": 2}}, "decode": {"gpus": 4}}}},
            "serving.roles.prefill.pipeline: a role of one stage has no pipeline",
        ),
        ({"policies": {"storage": "offload"}}, "storage offload with pipeline stages is not simulated"),
        ({"faults": [{"kind": "slow_gpu", "gpu": 0, "factor": 2.0}]}, "a fault with pipeline stages is not simulated"),
    ],
)
def test_what_stages_cannot_do_is_refused_by_name(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises((Infeasible, BadInput)) as told:
        deployment(tmp_path, **changes)
    assert said in told.value.line()


@pytest.mark.parametrize(
    ("engine", "nodes", "parallel"),
    [
        ("sglang", 2, {"tp": 2, "attention_dp": 4, "ep": 8, "pp": 2}),
        ("vllm", 1, {"tp": 2, "attention_dp": 2, "ep": 4, "pp": 2}),
        ("vllm", 4, {"tp": 8, "attention_dp": 2, "ep": 16, "pp": 2}),
        ("vllm", 2, {"tp": 8, "ep": 8, "pp": 2}),
    ],
)
def test_stages_of_whole_nodes_or_of_one_node_run(
    engine: str, nodes: int, parallel: dict[str, int], tmp_path: Path
) -> None:
    found = deployment(
        tmp_path,
        engine={"name": engine},
        cluster={"system": "h200_sxm", "nodes": nodes},
        parallel=parallel,
        policies={"dispatch": {"backend": "allgather_reducescatter"}},
    )
    assert found.setup.nodes * 2 == max(nodes, 2)


def test_what_a_run_in_stages_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = small(parallel=DP4 | {"pp": 2})
    data["serving"]["workload"] |= {"requests": 60}
    path = write(tmp_path, data)
    report, timeline = tmp_path / "report.html", tmp_path / "timeline.json.gz"
    asked = ["--explain", "--report", str(report), "--timeline", str(timeline)]
    assert run(["simulate", str(path), "--json", "--draws", "2", *asked]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["metrics"]["requests_completed"] == 60
    assert told["plan"]["parallel"]["pp"] == 2
    assert told["plan"]["pipeline"] == {"layers": [8, 8], "batches": 2, "running_requests_per_dp_rank": 32}
    step = told["step"]
    sent = step["stages"][0]["to_the_next_s"]
    assert sum(one["seconds"] for one in step["stages"]) + sent == pytest.approx(step["step_s"])
    assert sum(step["by_operation_s"].values()) <= step["step_s"] + 1e-12
    assert step["by_operation_s"]["pipeline_transfer"] == pytest.approx(sent)
    assert len(step["by_rank_s"]) == 8
    assert len(told["memory"]["stages"]) == 2
    assert all(0 < share < 1 for share in told["serving"]["stage_busy"])
    assert sum(told["provenance"].values()) == pytest.approx(1.0)
    typical = next(one for one in told["explain"]["steps"] if one["which"] == "typical")
    assert typical["stages"] == 2
    assert sum(typical["critical_path_s"].values()) == pytest.approx(typical["step_s"])
    assert len(typical["waited_s"]) == 8
    assert typical["what_if"]["infinite_network"]["step_s"] < typical["step_s"]
    assert "in 2 stages" in report.read_text()
    assert "Serving in pipeline stages is not validated" in report.read_text()


def test_the_last_stage_drafts(tmp_path: Path) -> None:
    """What drafting adds is what it adds to one stage of all layers, on the last; by table and by the executors."""
    serving = {"speculative": {"method": "mtp", "draft_tokens": 2, "acceptance": 0.6}}
    given: dict[str, Any] = {
        "model": "deepseek-ai/DeepSeek-V3",
        "precision": {},
        "engine": {"name": "moesim", "version": "1"},
        "cluster": {"system": "h200_sxm", "nodes": 2},
    }
    models = {}
    for stages in (1, 2):
        for name, drafting in (("with", serving), ("without", {})):
            parallel = {"attention_dp": 8, "ep": 8, "pp": stages}
            found = deployment(tmp_path, parallel=parallel, serving=drafting, **given)
            models[stages, name] = StepModel(found, seed=0)
    assert "weights_mtp" in models[2, "with"].deployment.memory.stages[1].items
    assert "weights_mtp" not in models[2, "with"].deployment.memory.stages[0].items
    plan = planned(models[1, "with"], 8)
    one, two = models[1, "with"].base, models[2, "with"].base.stages(plan)
    assert two.host_s + sum(two.stages_s) == pytest.approx(one(plan), rel=1e-9)
    verifying = models[2, "with"].base._step_s(verified(plan, 2), 1)
    assert two.stages_s[1] > verifying
    exact = ExactModel(models[2, "with"], "maxplus")
    drawn = [exact.stages(plan) for _ in range(4)]
    for stage in range(2):
        mean = np.mean([times.stages_s[stage] for times in drawn])
        assert two.stages_s[stage] == pytest.approx(mean, rel=0.05)
    with pytest.raises(Infeasible, match="speculative decoding of sglang with pipeline stages"):
        given["engine"] = {"name": "sglang", "version": "1"}
        deployment(tmp_path, parallel={"attention_dp": 8, "ep": 8, "pp": 2}, serving=serving, **given)


def test_low_latency_limits_each_batch_not_all_of_them(tmp_path: Path) -> None:
    serving = small()["serving"]
    serving["batching"] |= {"max_running_requests_per_dp_rank": 400}
    for engine, running in (("vllm", 256), ("sglang", 128)):  # SGLang's share were 200
        found = deployment(tmp_path, engine={"name": engine, "version": "1"}, serving=serving)
        model = StepModel(found, seed=0)
        assert (model.limits.max_running, model.most_running) == (400, running)
        flow = flow_of(found, model.limits)
        assert flow is not None
        assert flow.running == running
        assert model.grid("decode").tokens[-1] == running
    alone = StepModel(deployment(tmp_path, parallel=DP4, serving=serving), seed=0)
    assert alone.limits.max_running == alone.most_running == 128


def test_roles_may_have_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each stage's GPUs send what they hold: all bytes move, and a prompt's part of a GPU is half as long under way."""
    stages = {"attention_dp": 2, "ep": 2, "pp": 2}
    found = {}
    for name, prefill in (("one", {"attention_dp": 4, "ep": 4}), ("two", stages)):
        data = small()
        decode = {"gpus": 4, "parallel": stages, "pipeline": {"layers": [7, 9]}}
        data["serving"]["roles"] = {"prefill": {"gpus": 4, "parallel": prefill}, "decode": decode}
        data["serving"]["workload"] = {
            "isl": 256,
            "osl": 4,
            "requests": 8,
            "arrivals": {"poisson": {"requests_per_s": 1}},
        }
        assert run(["simulate", str(write(tmp_path, data)), "--json", "--draws", "0", "--explain"]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    sent = {name: told["explain"]["transfer"]["bytes"] for name, told in found.items()}
    assert sent["one"] == sent["two"] > 0
    waited = {name: told["metrics"]["roles"]["transfer"]["transfer_s"]["p50"] for name, told in found.items()}
    assert waited["two"] == pytest.approx(waited["one"] / 2, rel=0.02)
    told = found["two"]
    assert len(told["serving"]["roles"]["prefill"]["stage_busy"]) == 2
    assert all(0 < told["metrics"]["roles"][role]["busy"] < 1 for role in ("prefill", "decode"))
    assert {(one["role"], one["stages"]) for one in told["explain"]["steps"]} == {("decode", 2), ("prefill", 2)}


def test_a_run_is_the_same_by_both_executors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = small(parallel=DP4 | {"pp": 2})
    data["serving"]["workload"] = {"isl": 64, "osl": 4, "requests": 12, "arrivals": {"concurrency": 6}}
    path = write(tmp_path, data)
    found = []
    for fidelity in ("maxplus", "des"):
        assert run(["simulate", str(path), "--json", "--draws", "0", "--fidelity", fidelity]) == 0
        found.append(json.loads(capsys.readouterr().out)["metrics"]["duration_s"])
    assert found[0] == pytest.approx(found[1], rel=1e-9)
