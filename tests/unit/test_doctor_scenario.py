"""`moesim doctor SCENARIO`: divisibility, DeepEP's limits, buffers, memory, and the first error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moesim.cli import run
from moesim.commands.doctor.buffers import buffers, nccl_communicator_bytes, nccl_connection_bytes
from moesim.commands.doctor.deepep import LOW_LATENCY_HIDDEN, limits
from moesim.commands.doctor.divisibility import divisibility
from moesim.commands.doctor.findings import Finding
from moesim.commands.doctor.scenario import Checked, check_scenario
from moesim.engine.deepep_memory import deepep_buffer_bytes
from moesim.engine.memory import MemoryLedger
from moesim.spec.hf import load_model
from moesim.spec.parallel import ParallelSpec
from moesim.spec.presets import load_cluster
from moesim.spec.scenario import ClusterChoice, DispatchSpec, PoliciesSpec, PrecisionSpec, Scenario
from tests.scenarios import DEMO

SCENARIO = """
model: deepseek-ai/DeepSeek-V3
cluster: {system: h200_sxm, nodes: 4}
cost: {source: roofline}
placement: {solver: contiguous, redundant_experts: 32}
serving: {workload: {isl: 2000, osl: 256, requests: 10, arrivals: {concurrency: 4}}}
"""
V3 = "deepseek-ai/DeepSeek-V3"
H200 = load_cluster(ClusterChoice(system="h200_sxm", nodes=4))


def check(folder: Path, text: str, *overrides: str) -> Checked:
    path = folder / "scenario.yaml"
    path.write_text(text)
    return check_scenario(path, overrides)


def test_a_sound_scenario(tmp_path: Path) -> None:
    checked = check(tmp_path, SCENARIO)
    assert checked.error is None
    assert [finding.line() for finding in checked.findings if finding.state != "ok"] == []
    found = {finding.check: finding.detail for finding in checked.findings}
    assert found["parallel"] == "DP32 EP32, 1 instance"
    assert found["placement"] == "9 slots of each layer on each of 32 ranks"
    assert found["divides slots"] == "288 expert slots / ep 32 = 9"
    assert "tokens of an attention-DP rank" in found["memory"]
    assert found["coverage"].endswith("100 % formula")
    assert {row.phase for row in checked.coverage} == {"decode", "prefill"}


@pytest.mark.parametrize(
    ("text", "code", "message", "last"),
    [
        (SCENARIO.replace("DeepSeek-V3", "DeepSeek-V9"), 2, "unknown model", "scenario"),
        (SCENARIO.replace("h200_sxm", "h999"), 2, "unknown cluster preset", "model"),
        (SCENARIO.replace("roofline", "crystal_ball"), 2, "cost.source: unknown cost", "cluster"),
        (SCENARIO.replace("contiguous", "oracle"), 2, "placement.solver: unknown solver", "cost model"),
        (
            SCENARIO.replace("experts: 32", "experts: 3"),
            1,
            "259 slots do not divide by ep 32; use 32 redundant",
            "parallel",
        ),
        (SCENARIO.replace("nodes: 4", "nodes: 1").replace("h200", "h100"), 1, "weights and buffers need", "placement"),
        (SCENARIO + "parallel: {tp: 3, ep: 3}\n", 1, "do not divide the cluster's 32", "deepep"),
        (SCENARIO + "routing: {loads: [{file: none.json}]}\n", 2, "none.json", "solver"),
        (SCENARIO + "sytem: x\n", 2, "sytem: unknown key", None),
        (SCENARIO + "system: nothing\n", 2, "unknown system", None),
    ],
)
def test_the_first_error_of_a_scenario(tmp_path: Path, text: str, code: int, message: str, last: str | None) -> None:
    checked = check(tmp_path, text)
    assert checked.error is not None
    assert checked.error.exit_code == code
    assert message in checked.error.line()
    assert (checked.findings[-1].check if checked.findings else None) == last


def test_keys_are_set_as_for_simulate(tmp_path: Path) -> None:
    checked = check(tmp_path, SCENARIO, "placement.redundant_experts=3")
    assert checked.error is not None
    assert "259 slots" in checked.error.line()


@pytest.mark.parametrize("engine", ["sglang", "vllm", "trtllm", "moesim"])
def test_every_engine_that_a_scenario_may_name_is_priced(engine: str, tmp_path: Path) -> None:
    checked = check(tmp_path, SCENARIO, f"engine.name={engine}")
    assert checked.error is None
    assert (checked.findings[-1].check, checked.findings[-1].state) == ("coverage", "ok")


def divided(model: str = V3, policies: dict[str, Any] | None = None, redundant: int = 0, **degrees: int) -> list[str]:
    parallel = ParallelSpec(**degrees)
    spec = PoliciesSpec.model_validate(policies or {})
    found = divisibility(load_model(model), H200, parallel, PrecisionSpec(), spec, redundant)
    return [finding.line() for finding in found if finding.state != "ok"]


def test_every_check_of_divisibility_is_made() -> None:
    lines = divided(tp=3, ep=3, redundant=1)
    assert [line.partition(":")[0].split(maxsplit=1)[1] for line in lines] == [
        "divides gpus", "divides heads", "divides slots", "divides attention output width", "divides vocabulary",
    ]  # fmt: skip
    assert "32 GPUs of the cluster do not divide by an instance of 3; change parallel.tp" in lines[0]
    assert "257 expert slots do not divide by ep 3; set placement.redundant_experts to 2" in lines[2]


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"tp": 1, "attention_dp": 12, "ep": 12}, "does not fill whole nodes of 8; change parallel.attention_dp"),
        ({"tp": 16, "ep": 16}, "tp 16 spans nodes of 8 GPUs"),
        ({"pp": 64, "attention_dp": 8, "ep": 8}, "61 layers cannot fill 64 stages; set parallel.pp to 61 at most"),
        ({"pp": 2, "attention_dp": 6, "ep": 6}, "stage of 6 GPUs neither divides a node of 8 nor fills several"),
        ({"tp": 32, "expert_tp": 32}, "2048 columns / expert_tp 32 = 64 is no multiple of fp8_block's block of 128"),
    ],
)
def test_what_does_not_divide_names_its_key(degrees: dict[str, int], words: str) -> None:
    assert any(words in line for line in divided(**degrees))


def test_kv_heads_are_repeated_or_do_not_fit() -> None:
    qwen = "Qwen/Qwen3-235B-A22B"  # 4 KV heads
    assert any("4 KV heads at tp 8: each is kept 2 times" in line for line in divided(qwen, tp=8, ep=8))
    assert not any("KV heads" in line for line in divided(qwen, tp=4, ep=4))
    assert not divided(qwen, tp=8, ep=8, decode_cp=2)
    assert any(
        "keeps a context 2 times, decode_cp 4 does not divide that" in line
        for line in divided(qwen, tp=8, ep=8, decode_cp=4)
    )
    assert any("keeps a context 1 times" in line for line in divided(qwen, tp=2, ep=2, decode_cp=2))
    assert not any("context" in line for line in divided(tp=8, ep=8, decode_cp=8))


def test_a_vocabulary_is_padded_or_does_not_fit() -> None:
    assert any("50304 rows" in line for line in divided("allenai/OLMoE-1B-7B-0924", tp=5, ep=5))
    # gpt-oss: 201,088 = 64 x 3142 rows; seven divide neither
    lines = divided("openai/gpt-oss-120b", tp=7, ep=7)
    assert any("nor do the 201088 that engines pad to; change parallel.tp" in line for line in lines)


def test_too_many_replicas_and_ranks() -> None:
    assert any("more than one replica" in line for line in divided(attention_dp=2, ep=2, redundant=258))
    many = divided("mistralai/Mixtral-8x7B-v0.1", attention_dp=32, ep=32, redundant=24)
    assert any("ep 32 is more than the 8 experts; lower parallel.ep" in line for line in many)


def scenario(**changes: Any) -> Scenario:
    base: dict[str, Any] = {
        "model": V3,
        "cluster": {"system": "h200_sxm", "nodes": 4},
        "serving": {
            "workload": {"isl": 100, "osl": 10, "requests": 1, "arrivals": {"concurrency": 1}},
        },
    }
    return Scenario.model_validate(base | changes)


def deepep(
    model: str = V3, *, ep: int = 32, slots: int = 256, tokens: int = 128, mode: str = "auto", hidden: int = 0,
    top_k: int = 0, gpus_per_node: int = 8, **changes: Any,
) -> list[Finding]:  # fmt: skip
    loaded = load_model(model)
    moe = loaded.moe.model_copy(update={"top_k": top_k} if top_k else {})
    loaded = loaded.model_copy(update={"moe": moe} | ({"hidden": hidden} if hidden else {}))
    cluster = H200.model_copy(update={"gpus_per_node": gpus_per_node})
    spec = scenario(policies={"dispatch": {"backend": "deepep", "mode": mode}}, **changes)
    return limits(spec, loaded, cluster, ParallelSpec(attention_dp=ep, ep=ep), slots, tokens)


def test_deepep_has_kernels_for_deepseek() -> None:
    (found,) = deepep()
    assert found.state == "ok"
    assert "normal and low-latency" in found.detail
    assert deepep(ep=1) == []


@pytest.mark.parametrize(
    ("asked", "state", "words"),
    [
        ({"hidden": 7000}, "fault", "width 7000 is no multiple of the 128"),
        ({"hidden": 2880, "mode": "low_latency"}, "fault", "no low-latency kernels for width 2880"),
        ({"hidden": 2880, "mode": "low_latency", "engine": {"name": "vllm"}}, "warn", "vLLM pads rows to 3072"),
        ({"top_k": 12, "mode": "low_latency"}, "fault", "take top-11 at most, the model has top-12"),
        ({"top_k": 10}, "warn", "needs DeepEP after pull request 403"),
        ({"top_k": 33, "mode": "normal"}, "fault", "normal kernels take top-32 at most"),
        ({"ep": 40, "slots": 280}, "fault", "no normal kernels for 5 nodes"),
        ({"ep": 24, "slots": 264}, "warn", "no normal kernels for 3 nodes of 8 ranks, though"),
        ({"ep": 6, "slots": 258}, "fault", "no normal kernels for ep 6 within a node"),
        ({"ep": 12, "slots": 264, "mode": "low_latency"}, "fault", "ep 12 is no multiple of its 8 NVLink peers"),
        ({"gpus_per_node": 4}, "warn", "a node here has 4 GPUs"),
        ({"ep": 2, "slots": 2050}, "fault", "1025 experts a rank are more than its 1024"),
        ({"slots": 1856}, "fault", "1856 expert slots are more than the 1848 that 132 multiprocessors serve"),
        ({"tokens": 512}, "warn", "need a queue of 1026, NVSHMEM_QP_DEPTH is 1024"),
    ],
)
def test_what_deepep_was_not_compiled_for(asked: dict[str, Any], state: str, words: str) -> None:
    found = [finding for finding in deepep(**asked) if words in finding.detail]
    assert [finding.state for finding in found] == [state]
    assert found[0].mend


@pytest.mark.parametrize("hidden", LOW_LATENCY_HIDDEN)
def test_every_compiled_width_is_taken(hidden: int) -> None:
    assert [finding.state for finding in deepep(hidden=hidden)] == ["ok"]


def test_low_latency_alone_does_not_ask_for_normal_kernels() -> None:
    assert [finding.state for finding in deepep(ep=24, slots=264, mode="low_latency")] == ["ok"]


def memory(kv: float, **items: float) -> MemoryLedger:
    return MemoryLedger({**items, "kv_cache": kv}, 1e11, 1e11, 1.0, 1, {})


def told(
    counted: MemoryLedger, environ: dict[str, str] | None = None, *, ep: int = 32, **dispatch: Any
) -> list[Finding]:
    spec = DispatchSpec.model_validate({"backend": "deepep", **dispatch})
    return buffers(load_model(V3), ParallelSpec(attention_dp=ep, ep=ep), spec, 288, 128, counted, environ or {})


def test_deepeps_buffers_are_the_ledgers() -> None:
    whole = deepep_buffer_bytes(7168, 32, 288, normal=True, low_latency_tokens=128)
    counted = memory(50e9, communication_buffers=whole, low_latency_tensors=1e9)
    (found, _) = told(counted)
    assert found.state == "ok"
    assert "NVLink queues 378 MB" in found.detail
    assert "heap for the larger of them 2.15 GB" in found.detail
    assert f"{(whole + 1e9) / (50e9 + whole + 1e9):.1%} of 53.5 GB" in found.detail


def test_large_buffers_are_told() -> None:
    whole = deepep_buffer_bytes(7168, 32, 288, normal=True, low_latency_tokens=128)
    (found, _) = told(memory(5e9, communication_buffers=whole))
    assert found.state == "warn"
    assert "dispatch limit" in found.mend


def test_buffers_of_one_mode() -> None:
    (normal, _) = told(memory(50e9), mode="normal")
    assert "low-latency" not in normal.detail
    assert "heap for the larger of them 537 MB" in normal.detail
    (low, _) = told(memory(50e9), mode="low_latency")
    assert "NVLink" not in low.detail
    assert told(memory(50e9), backend="allgather_reducescatter", ep=1) == []


def test_nccls_buffers_by_its_source() -> None:
    # 4 MiB, 512 KiB and 4.6875 MiB: what one connection was seen to take with the defaults
    assert nccl_connection_bytes() == pytest.approx(9.1875 * 2**20)
    assert nccl_communicator_bytes(16, 4) == 64 * nccl_connection_bytes()
    (*_, found) = told(memory(50e9, nccl_buffers=411e6))
    assert found.check == "nccl buffers"
    assert "1 communicator (attention_dp): 411 MB in the ledger" in found.detail
    assert "154 MB (16 channels, rings) to 1.23 GB (32 channels, rings and trees)" in found.detail
    assert told(memory(2e9, nccl_buffers=411e6))[-1].state == "warn"


def test_the_environment_changes_nccls_buffers() -> None:
    (*_, found) = told(memory(50e9), {"NCCL_BUFFSIZE": "1048576", "NCCL_MAX_NCHANNELS": "8"})
    assert "8 channels, rings and trees" in found.detail
    assert "6.49 MB a connection" in found.detail
    (wrong, found) = told(memory(50e9), {"NCCL_BUFFSIZE": "4M"})[-2:]
    assert (wrong.state, found.state) == ("warn", "ok")
    assert "NCCL_BUFFSIZE is '4M'" in wrong.detail


def test_the_demo_is_sound(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", str(DEMO)]) == 0
    out = capsys.readouterr().out
    assert "FAULT" not in out
    assert "profile coverage" in out
    (beyond,) = [line for line in out.splitlines() if line.startswith("extrapolated; ")]
    assert beyond.endswith("--out DIR`:")  # the demo allows extrapolation already
    assert re.search(r"^decode +Gemm n=2112 k=7168 dtype=fp8_block +m 1\.\.128", out, re.MULTILINE)


def test_a_plan_that_deepep_cannot_run_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text(SCENARIO.replace("nodes: 4", "nodes: 5") + "parallel: {attention_dp: 40, ep: 40}\n")
    assert run(["doctor", str(path), "--set", "placement.redundant_experts=24", "--json"]) == 1
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert printed["ok"] is False
    assert printed["error"] is None
    faults = [finding for finding in printed["findings"] if finding["state"] == "fault"]
    assert ["no normal kernels for 5 nodes" in finding["detail"] for finding in faults] == [True]
    assert {"phase", "kernel", "shape", "prices", "shares", "ranges", "sources", "mend"} == set(printed["coverage"][0])
    assert captured.err.count("\n") == 1
