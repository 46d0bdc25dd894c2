"""What the columns of aiconfigurator-core's other tables mean: exchanges, whole attention blocks, WideEP experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from moesim.errors import BadInput
from profiles.importers.aiconfigurator import import_tables

COMMON = {"framework": "VLLM", "version": "1", "device": "NVIDIA GB300", "kernel_source": "k"}
BLOCK: dict[str, Any] = {
    "op_name": "o", "model": "m", "architecture": "a", "mla_dtype": "bfloat16", "kv_cache_dtype": "fp8",
    "gemm_type": "fp8_block", "num_heads": 16, "batch_size": 4, "tp_size": 8, "latency": 0.5,
}  # fmt: skip


def imported(root: Path, path: str, *rows: dict[str, Any], nodes_of: int | None = None) -> dict[str, pl.DataFrame]:
    data = root / "data"
    target = data / "gb300" / f"{path}.parquet"
    target.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame([{**COMMON, **row} for row in rows]).write_parquet(target)
    if nodes_of:
        (root / "gb300.yaml").write_text(f"node: {{num_gpus_per_node: {nodes_of}}}\n")
    found = import_tables(data, system="gb300", engine="all", package_version="0")
    return {name: table for name, table in found.items() if table.height}


def test_a_node_has_as_many_gpus_as_its_system_says(tmp_path: Path) -> None:
    shape = {"node_num": 2, "hidden_size": 7168, "num_token": 64, "num_topk": 8, "num_experts": 256}
    times = {"dispatch_avg_t_us": 30.0, "combine_avg_t_us": 40.0}
    found = imported(tmp_path, "comm/sglang/1/wideep_deepep_ll_perf", {**shape, **times}, nodes_of=4)
    assert found["exchange"]["ep"].to_list() == [8, 8]
    row = {"allreduce_dtype": "bfloat16", "num_gpus": 16, "message_size": 512, "latency": 0.01}
    found = imported(tmp_path, "comm/vllm/1/custom_allreduce_perf", {**row, "kernel_source": "vLLM_custom_graph"})
    assert found["collective"].select("gpus", "nodes", "bytes").row(0) == (16, 4, 1024.0)


def test_int8_and_eager_collectives_are_variants(tmp_path: Path) -> None:
    rows = [
        {"nccl_dtype": dtype, "num_gpus": 8, "message_size": 1024, "op_name": "alltoall", "latency": 0.02}
        for dtype in ("half", "int8")
    ]
    found = imported(tmp_path, "comm/nccl/2/nccl_perf", *rows)
    assert found["collective"]["bytes"].to_list() == [2048]
    variant = found["collective_variant"].select("kind", "path", "dtype", "launch", "bytes").row(0)
    assert variant == ("all_to_all", "nccl", "int8", "nccl-tests", 1024.0)
    row = {"allreduce_dtype": "bfloat16", "num_gpus": 8, "message_size": 512, "latency": 0.01}
    found = imported(tmp_path, "comm/vllm/1/custom_allreduce_perf", {**row, "kernel_source": "vLLM_custom_eager"})
    assert "eager" in found["collective_variant"]["launch"].to_list()


A2A = {
    "op_name": "moe_a2a", "ep_size": 8, "node_num": 1, "hidden_size": 7168, "topk": 8, "num_experts": 256, "sms": 0,
    "num_tokens": 64, "transmit_us": 40.0, "notify_us": 2.0, "latency": 42.0,
}  # fmt: skip


def test_an_all_to_all_is_in_microseconds_and_combines_in_bf16_unless_it_says_fp4(tmp_path: Path) -> None:
    row = {**A2A, "comm_backend": "trtllm_deepep_ll"}
    found = imported(
        tmp_path, "comm/trtllm/1/moe_a2a_perf", {**row, "phase": "dispatch", "comm_dtype": "nvfp4"},
        {**row, "phase": "combine", "comm_dtype": "fp4"}, {**row, "phase": "combine", "comm_dtype": "fp8"},
        {**A2A, "comm_backend": "deepep_ht", "phase": "dispatch", "comm_dtype": "default"},
        {**A2A, "comm_backend": "pigeons", "phase": "dispatch", "comm_dtype": "default"},
    )["all_to_all"]  # fmt: skip
    assert set(found.select("step", "backend", "dispatch_dtype").rows()) == {
        ("dispatch", "deepep_low_latency", "nvfp4"), ("combine_low_precision", "deepep_low_latency", "nvfp4"),
        ("combine", "deepep_low_latency", "fp8"), ("dispatch", "deepep_normal", "bf16"),
    }  # fmt: skip
    assert found["latency_s"].to_list() == pytest.approx([42e-6] * 4)


def test_an_all_to_all_in_two_units_is_refused_by_row(tmp_path: Path) -> None:
    row = {**A2A, "comm_backend": "deepep_ll", "phase": "dispatch", "comm_dtype": "default"}
    with pytest.raises(BadInput, match=r"latency is 0\.042, not transmit_us and notify_us together in row 1"):
        imported(tmp_path, "comm/vllm/1/moe_a2a_perf", row, {**row, "num_tokens": 128, "latency": 0.042})


def test_nvlink_exchanges_keep_their_steps(tmp_path: Path) -> None:
    row = {
        "kernel_source": "NVLinkTwoSided", "moe_dtype": "nvfp4", "num_tokens": 64, "hidden_size": 7168, "topk": 8,
        "num_experts": 256, "moe_ep_size": 16, "distribution": "balanced", "latency": 0.02,
    }  # fmt: skip
    steps = ("prepare", "dispatch", "combine", "combine_low_precision")
    rows = [{**row, "op_name": f"alltoall_{step}"} for step in steps]
    found = imported(tmp_path, "comm/trtllm/1/trtllm_alltoall_perf", *rows, nodes_of=4)["all_to_all"]
    assert sorted(found["step"]) == sorted(steps)
    assert set(found.select("backend", "ep", "nodes", "dispatch_dtype").rows()) == {
        ("nvlink_two_sided", 16, 4, "nvfp4")
    }


@pytest.mark.parametrize(
    ("path", "kv_tokens"),
    [
        ("mla/vllm/1/mla_generation_module_perf", 1024),  # files the tokens that it attends to
        ("mla/trtllm/1/dsa_generation_module_perf", 1024),
        ("mla/sglang/1/dsa_generation_module_perf", 1025),  # files the cached ones
        ("mla/vllm/1/msa_generation_module_perf", 1025),
    ],
)
def test_a_block_decodes_over_the_tokens_that_its_collector_means(tmp_path: Path, path: str, kv_tokens: int) -> None:
    found = imported(tmp_path, path, {**BLOCK, "isl": 1, "step": 1024})["attention_module_decode"]
    assert found.select("kv_tokens", "batch", "heads", "tp").row(0) == (kv_tokens, 4, 16, 8)


def test_a_block_after_a_prefix_keeps_it_and_the_skipped_indexer_is_another_module(tmp_path: Path) -> None:
    rows = [{**BLOCK, "isl": 64, "step": 4096, "op_name": f"dsa_context_module{end}"} for end in ("", "_skip_indexer")]
    found = imported(tmp_path, "mla/sglang/1/dsa_context_module_perf", *rows)["attention_module_prefill"]
    assert found["module"].to_list() == ["dsa", "dsa_skip_indexer"]
    assert found.select("prefix_tokens", "new_tokens", "compress_ratio").row(0) == (4096, 64, 0)


def test_wide_ep_blocks_count_cached_tokens_as_isl_and_older_ones_name_no_model(tmp_path: Path) -> None:
    row = {name: value for name, value in BLOCK.items() if name not in ("model", "architecture", "gemm_type")}
    found = imported(tmp_path, "mla/sglang/1/wideep_generation_mla_perf", {**row, "isl": 512, "step": 0})
    block = found["attention_module_decode"]
    assert block.select("module", "model", "kv_tokens").row(0) == ("wideep_mla", "deepseek-ai/DeepSeek-V3", 513.0)


def test_wide_ep_experts_are_slots_and_no_fused_kernel(tmp_path: Path) -> None:
    row = {
        "moe_dtype": "nvfp4", "num_tokens": 1024, "hidden_size": 7168, "inter_size": 2048, "topk": 8,
        "num_experts": 256, "num_slots": 288, "moe_tp_size": 1, "moe_ep_size": 32,
        "distribution": "power_law_1.2_eplb", "latency": 0.1,
    }  # fmt: skip
    found = imported(tmp_path, "moe/trtllm/1/wideep_moe_perf", row)["experts"]
    assert found.select("grouping", "local_experts", "routed").row(0) == ("wideep", 9, 1024 * 8 / 32)
