"""What each table of aiconfigurator-core means, column by column: one converter a table.

The meanings were looked up in the collectors that wrote the tables, in the public repository ai-dynamo/aiconfigurator;
every converter names its collector, and docs/explanation/costs.md tells the whole. Latencies there are milliseconds
unless the column ends in `_us`; here they are seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moesim.errors import BadInput
from moesim.units import MICRO, MILLI
from profiles.protocols import MOVING, combined
from profiles.record import LATENCY

if TYPE_CHECKING:
    import polars as pl

PACKAGE = "aiconfigurator-core"

# Their names of element types -> ours.
DTYPES = {
    "bfloat16": "bf16",
    # Older collectors wrote float16 for tensors made as torch.bfloat16 (collector/sglang/collect_mla.py).
    "float16": "bf16",
    "half": "fp16",
    "fp8": "fp8",
    "fp8_block": "fp8_block",
    "int8": "int8",
    "int8_wo": "int8",
    "int4_wo": "int4",
    "w4a16_mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
}
# MLA widths of DeepSeek-V3, which every MLA collector fixes (collector/sglang/collect_mla.py, collect_mla_bmm.py).
MLA_WIDTHS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "value_head_dim": 128}
# DeepEP's own tests send fp8 with scales and combine bf16 (collector/deep_collector/test_low_latency.py: use_fp8=True;
# extract_data.py: "Best dispatch (FP8)").
EXCHANGE_DTYPES = {"dispatch": "fp8", "combine": "bf16"}
# nccl-tests' size is in bytes; the collector divides it by the element's size (collector/network/collect_nccl.py).
NCCL_ELEMENT_BYTES = {"half": 2, "int8": 1}
CUSTOM_ELEMENT_BYTES = 2  # bfloat16 (collector/network/collect_all_reduce.py: `size` elements of the dtype)
NCCL_KINDS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
}


@dataclass(frozen=True)
class Source:
    """One table file of the package."""

    path: Path
    system: str
    engine: str
    version: str
    package_version: str


def _columns(rows: pl.DataFrame, source: Source, *names: str) -> None:
    lacking = [name for name in names if name not in rows.columns]
    if lacking:
        raise BadInput(
            f"the column {lacking[0]!r} is missing",
            where=str(source.path),
            mend=f"use a version of {PACKAGE} whose tables have it (0.12.0 does)",
        )


def _dtype(column: str) -> pl.Expr:
    import polars as pl

    return pl.col(column).replace(DTYPES)


def _latency(column: str = "latency", unit: float = MILLI) -> pl.Expr:
    import polars as pl

    return (pl.col(column).cast(pl.Float64) * unit).alias(LATENCY)


def _kernel() -> list[pl.Expr]:
    import polars as pl

    return [pl.col("kernel_source").alias("kernel"), pl.col("device")]


def convert_gemm(rows: pl.DataFrame, source: Source) -> tuple[pl.DataFrame, ...]:
    """gemm_perf: collector/sglang/collect_gemm.py; m tokens, weights [n, k]."""
    import polars as pl

    _columns(rows, source, "gemm_dtype", "m", "n", "k", "latency", "kernel_source", "device")
    return (rows.select(_dtype("gemm_dtype").alias("dtype"), pl.col("m", "n", "k"), _latency(), *_kernel()),)


def _experts(rows: pl.DataFrame, source: Source, grouping: str) -> pl.DataFrame:
    """Tables of experts: `num_tokens` counts the tokens of all ranks of the EP group together."""
    import polars as pl

    _columns(
        rows, source, "moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts",
        "moe_tp_size", "moe_ep_size", "distribution", "latency", "kernel_source", "device",
    )  # fmt: skip
    rows = rows.filter(
        (pl.col("num_experts") % pl.col("moe_ep_size") == 0) & (pl.col("inter_size") % pl.col("moe_tp_size") == 0)
    )
    return rows.select(
        pl.lit(grouping).alias("grouping"),
        _dtype("moe_dtype").alias("dtype"),
        pl.col("hidden_size").alias("hidden"),
        (pl.col("inter_size") // pl.col("moe_tp_size")).alias("intermediate"),
        pl.col("num_experts").alias("experts"),
        pl.col("topk").alias("top_k"),
        (pl.col("num_experts") // pl.col("moe_ep_size")).alias("local_experts"),
        pl.col("distribution").replace({"balanced": "uniform"}),
        (pl.col("num_tokens") * pl.col("topk") / pl.col("moe_ep_size")).alias("routed"),
        _latency(),
        *_kernel(),
    )


def convert_fused(rows: pl.DataFrame, source: Source) -> tuple[pl.DataFrame, ...]:
    """moe_perf: collector/sglang/collect_moe.py; rank 0 of the EP group, the fullest where rows are skewed."""
    return (_experts(rows, source, "fused"),)


def convert_masked(rows: pl.DataFrame, source: Source) -> tuple[pl.DataFrame, ...]:
    """wideep_generation_moe_perf: collector/sglang/collect_wideep_deepep_moe.py, decode; inside a CUDA graph."""
    return (_experts(rows, source, "deepep_low_latency"),)


def convert_contiguous(rows: pl.DataFrame, source: Source) -> tuple[pl.DataFrame, ...]:
    """wideep_context_moe_perf: the same collector, prefill; launched eagerly, launches included."""
    return (_experts(rows, source, "deepep_normal"),)


def _attention(rows: pl.DataFrame, source: Source, *sizes: pl.Expr) -> pl.DataFrame:
    import polars as pl

    if "window_size" not in rows.columns:  # older collectors measured no windows
        rows = rows.with_columns(pl.lit(0).alias("window_size"))
    _columns(
        rows, source, "attn_dtype", "kv_cache_dtype", "num_heads", "num_key_value_heads", "head_dim", "window_size",
        "batch_size", "isl", "step", "beam_width", "latency", "kernel_source", "device",
    )  # fmt: skip
    # `num_key_value_heads` 0 stands for "as many as heads" in older tables.
    kv_heads = pl.when(pl.col("num_key_value_heads") == 0).then("num_heads").otherwise("num_key_value_heads")
    return rows.filter(pl.col("beam_width") == 1).select(
        _dtype("attn_dtype").alias("dtype"),
        _dtype("kv_cache_dtype").alias("kv_dtype"),
        pl.col("num_heads").alias("heads"),
        kv_heads.alias("kv_heads"),
        pl.col("head_dim"),
        pl.col("window_size").alias("window"),
        pl.col("batch_size").alias("batch"),
        *sizes,
        _latency(),
        *_kernel(),
    )


def convert_context_attention(rows: pl.DataFrame, source: Source) -> tuple[pl.DataFrame, ...]:
    """context_attention_perf: collector/sglang/collect_attn.py; `isl` new tokens, no prefix (`step` is 0)."""
    import polars as pl

    return (_attention(rows.filter(pl.col("step") == 0), source, pl.col("isl").alias("new_tokens")),)


def convert_generation_attention(rows: pl.DataFrame, source: Source) -> tuple[pl.DataFrame, ...]:
    """generation_attention_perf: the same collector; `step` cached tokens and one new: it attends to step + 1."""
    import polars as pl

    return (_attention(rows, source, (pl.col("step") + 1).alias("kv_tokens")),)


def _mla(rows: pl.DataFrame, source: Source, form: str, *sizes: pl.Expr) -> pl.DataFrame:
    import polars as pl

    _columns(
        rows, source, "mla_dtype", "kv_cache_dtype", "num_heads", "batch_size", "isl", "step", "latency",
        "kernel_source", "device",
    )  # fmt: skip
    return rows.select(
        pl.lit(form).alias("form"),
        _dtype("mla_dtype").alias("dtype"),
        _dtype("kv_cache_dtype").alias("kv_dtype"),
        pl.col("num_heads").alias("heads"),
        *(pl.lit(width).alias(name) for name, width in MLA_WIDTHS.items()),
        pl.col("batch_size").alias("batch"),
        *sizes,
        _latency(),
        *_kernel(),
    )


def convert_context_mla(rows: pl.DataFrame, source: Source) -> tuple[pl.DataFrame, ...]:
    """context_mla_perf. SGLang's collector runs it absorbed except on Blackwell; TensorRT-LLM's runs it expanded.

    collector/sglang/collect_mla.py: v_head_dim = kv_lora_rank and one KV head unless is_blackwell.
    """
    import polars as pl

    blackwell = source.system.startswith(("b200", "b300", "gb200", "gb300", "rtx_pro_6000"))
    form = "absorbed" if source.engine == "sglang" and not blackwell else "expanded"
    return (_mla(rows.filter(pl.col("step") == 0), source, form, pl.col("isl").alias("new_tokens")),)


def convert_generation_mla(rows: pl.DataFrame, source: Source) -> tuple[pl.DataFrame, ...]:
    """generation_mla_perf: absorbed; `step` cached tokens and one new."""
    import polars as pl

    return (_mla(rows, source, "absorbed", (pl.col("step") + 1).alias("kv_tokens")),)


def convert_mla_bmm(rows: pl.DataFrame, source: Source) -> tuple[pl.DataFrame, ...]:
    """mla_bmm_perf: collector/sglang/collect_mla_bmm.py; mla_gen_pre is 128 -> 512, mla_gen_post 512 -> 128 a head."""
    import polars as pl

    _columns(rows, source, "op_name", "bmm_dtype", "num_tokens", "num_heads", "latency", "kernel_source", "device")
    sides = {"mla_gen_pre": "pre", "mla_gen_post": "post"}
    rows = rows.filter(pl.col("op_name").is_in(list(sides)))
    return (
        rows.select(
            pl.col("op_name").replace(sides).alias("side"),
            _dtype("bmm_dtype").alias("dtype"),
            pl.col("num_heads").alias("heads"),
            pl.lit(MLA_WIDTHS["kv_lora_rank"]).alias("kv_lora_rank"),
            pl.lit(MLA_WIDTHS["value_head_dim"]).alias("head_dim"),
            pl.col("num_tokens").alias("tokens"),
            _latency(),
            *_kernel(),
        ),
    )


def convert_nccl(rows: pl.DataFrame, source: Source) -> tuple[pl.DataFrame, ...]:
    """nccl_perf: collector/network/collect_nccl.py; one node; `message_size` counts elements.

    What adds up is taken in half precision only; what only moves was measured twice, in half and in int8.
    """
    import polars as pl

    _columns(rows, source, "nccl_dtype", "num_gpus", "message_size", "op_name", "latency")
    rows = rows.filter(
        pl.col("nccl_dtype").is_in(list(NCCL_ELEMENT_BYTES)) & pl.col("op_name").is_in(list(NCCL_KINDS))
    ).select(
        pl.col("op_name").replace(NCCL_KINDS).alias("kind"),
        pl.lit("nccl").alias("path"),
        pl.col("num_gpus").alias("gpus"),
        pl.lit(1).alias("nodes"),
        (pl.col("message_size") * pl.col("nccl_dtype").replace_strict(NCCL_ELEMENT_BYTES)).alias("bytes"),
        _latency(),
        pl.lit("NCCL").alias("kernel"),
        "nccl_dtype",
    )
    moving = pl.col("kind").is_in(MOVING)
    exchange = ["kind", "gpus", "bytes"]
    # Collections again of one row count as their median, here as elsewhere, before its two dtypes count as one.
    moved = rows.filter(moving).with_columns(pl.col(LATENCY).median().over([*exchange, "nccl_dtype"]))
    places = moved.select(pl.struct(exchange).rank("dense")).to_series().to_numpy().astype(np.int64)
    with np.errstate(divide="ignore", invalid="ignore"):  # a time that is no time stays one, for the store to refuse
        together = combined(places, moved[LATENCY].to_numpy())
    moved = moved.with_columns(pl.Series(LATENCY, together, dtype=moved.schema[LATENCY]))
    added = rows.filter(~moving & (pl.col("nccl_dtype") == "half"))
    return (pl.concat([added, moved]).drop("nccl_dtype"),)


def convert_oneccl(rows: pl.DataFrame, source: Source) -> tuple[pl.DataFrame, ...]:
    """oneccl_perf: the columns of nccl_perf, measured with Intel's oneCCL."""
    import polars as pl

    return tuple(
        table.with_columns(pl.lit("oneccl").alias("path"), pl.lit("oneCCL").alias("kernel"))
        for table in convert_nccl(rows, source)
    )


def convert_custom_all_reduce(rows: pl.DataFrame, source: Source) -> tuple[pl.DataFrame, ...]:
    """custom_allreduce_perf: collector/network/collect_all_reduce.py; `message_size` elements of bfloat16, in a graph.

    Rows of another engine's kernel, which some SGLang folders hold, are left out.
    """
    import polars as pl

    _columns(rows, source, "allreduce_dtype", "num_gpus", "message_size", "latency", "kernel_source", "framework")
    names = {"sglang": "sglang", "trtllm": "trtllm", "vllm": "vllm"}
    rows = rows.filter(
        (pl.col("allreduce_dtype") == "bfloat16")
        & (pl.col("framework").str.to_lowercase() == names[source.engine])
        & ~pl.col("kernel_source").str.to_lowercase().str.contains("eager", literal=True)
    )
    return (
        rows.select(
            pl.lit("all_reduce").alias("kind"),
            pl.lit("custom").alias("path"),
            pl.col("num_gpus").alias("gpus"),
            pl.lit(1).alias("nodes"),
            (pl.col("message_size") * CUSTOM_ELEMENT_BYTES).alias("bytes"),
            _latency(),
            *_kernel(),
        ),
    )


GPUS_PER_NODE = 8  # DeepEP's collectors run 8 ranks on each of `node_num` nodes


def _exchange(rows: pl.DataFrame, mode: str, times: dict[str, pl.Expr], sms: dict[str, pl.Expr]) -> pl.DataFrame:
    import polars as pl

    shape = (
        pl.lit(mode).alias("mode"),
        pl.col("node_num").alias("nodes"),
        (pl.col("node_num") * GPUS_PER_NODE).alias("ep"),
        pl.col("hidden_size").alias("hidden"),
        pl.col("num_topk").alias("top_k"),
        pl.col("num_experts").alias("experts"),
        pl.col("num_token").alias("tokens"),
    )
    return pl.concat(
        rows.select(
            pl.lit(step).alias("step"),
            *shape,
            pl.lit(EXCHANGE_DTYPES[step]).alias("dtype"),
            sms[step].cast(pl.Int64).alias("sms"),
            (time.cast(pl.Float64) * MICRO).alias(LATENCY),
            *_kernel(),
        )
        for step, time in times.items()
    )


def convert_deepep_normal(rows: pl.DataFrame, source: Source) -> tuple[pl.DataFrame, ...]:
    """wideep_deepep_normal_perf: collector/deep_collector/extract_data.py; a step takes transmit and notify."""
    import polars as pl

    columns = ("node_num", "hidden_size", "num_token", "num_topk", "num_experts", "dispatch_sms", "combine_sms")
    _columns(rows, source, *columns, "dispatch_transmit_us", "dispatch_notify_us", "combine_transmit_us", "device")
    steps = ("dispatch", "combine")
    times = {step: pl.col(f"{step}_transmit_us") + pl.col(f"{step}_notify_us") for step in steps}
    return (_exchange(rows, "normal", times, {step: pl.col(f"{step}_sms") for step in steps}),)


def convert_deepep_low_latency(rows: pl.DataFrame, source: Source) -> tuple[pl.DataFrame, ...]:
    """wideep_deepep_ll_perf: the mean time of a dispatch and of a combine kernel, return_recv_hook=False."""
    import polars as pl

    columns = ("node_num", "hidden_size", "num_token", "num_topk", "num_experts")
    _columns(rows, source, *columns, "dispatch_avg_t_us", "combine_avg_t_us", "device")
    steps = ("dispatch", "combine")
    times = {step: pl.col(f"{step}_avg_t_us") for step in steps}
    return (_exchange(rows, "low_latency", times, dict.fromkeys(steps, pl.lit(0))),)
