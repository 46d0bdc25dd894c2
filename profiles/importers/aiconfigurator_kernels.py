"""What the tables of products, experts and small kernels mean: one converter a kind of table."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from profiles.importers.aiconfigurator_tables import Converted, Source, dtype, origin, seconds

if TYPE_CHECKING:
    import polars as pl

GEMM_COUNTS, GEMM_TEXTS = ("m", "n", "k"), ("gemm_dtype",)
MOE_COUNTS = (
    "num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size",
)  # fmt: skip
MOE_TEXTS = ("moe_dtype", "distribution")


def convert_gemm(rows: pl.DataFrame, source: Source) -> Converted:
    """gemm_perf: collector/sglang/collect_gemm.py; m tokens, weights [n, k]."""
    import polars as pl

    return {"gemm": rows.select(dtype("gemm_dtype").alias("dtype"), pl.col("m", "n", "k"), seconds(), *origin(rows))}


def uneven_experts(source: Source) -> dict[str, pl.Expr]:
    """Splits that no engine can make."""
    import polars as pl

    return {
        "experts do not divide by EP": pl.col("num_experts") % pl.col("moe_ep_size") != 0,
        "widths do not divide by expert-TP": pl.col("inter_size") % pl.col("moe_tp_size") != 0,
    }


def uneven_slots(source: Source) -> dict[str, pl.Expr]:
    """Splits of slots that no engine can make."""
    import polars as pl

    return {**uneven_experts(source), "slots do not divide by EP": pl.col("num_slots") % pl.col("moe_ep_size") != 0}


def _experts(rows: pl.DataFrame, grouping: str, slots: str = "num_experts") -> Converted:
    """Tables of experts: `num_tokens` counts the tokens of all ranks of the EP group together."""
    import polars as pl

    table = rows.select(
        pl.lit(grouping).alias("grouping"),
        dtype("moe_dtype").alias("dtype"),
        pl.col("hidden_size").alias("hidden"),
        (pl.col("inter_size") // pl.col("moe_tp_size")).alias("intermediate"),
        pl.col("num_experts").alias("experts"),
        pl.col("topk").alias("top_k"),
        (pl.col(slots) // pl.col("moe_ep_size")).alias("local_experts"),
        pl.col("distribution").replace({"balanced": "uniform"}),
        (pl.col("num_tokens") * pl.col("topk") / pl.col("moe_ep_size")).alias("routed"),
        seconds(),
        *origin(rows),
    )
    return {"experts": table}


def convert_fused(rows: pl.DataFrame, source: Source) -> Converted:
    """moe_perf: collector/sglang/collect_moe.py; rank 0 of the EP group, the fullest where rows are skewed."""
    return _experts(rows, "fused")


def convert_masked(rows: pl.DataFrame, source: Source) -> Converted:
    """wideep_generation_moe_perf: collector/sglang/collect_wideep_deepep_moe.py, decode; inside a CUDA graph."""
    return _experts(rows, "deepep_low_latency")


def convert_contiguous(rows: pl.DataFrame, source: Source) -> Converted:
    """wideep_context_moe_perf: the same collector, prefill; launched eagerly, launches included."""
    return _experts(rows, "deepep_normal")


def convert_wide_ep(rows: pl.DataFrame, source: Source) -> Converted:
    """wideep_moe_perf: collector/trtllm/collect_wideep_moe_compute.py, TensorRT-LLM's WideEP without its exchange.

    The router over one rank's tokens, then rank 0's slots (`num_slots` / EP) over the tokens of all ranks that chose
    them; always skewed, `_eplb` after slots were balanced. As the router is in the time, it is a grouping of its own.
    """
    return _experts(rows, "wideep", slots="num_slots")


def convert_moe_module(rows: pl.DataFrame, source: Source) -> Converted:
    """dsv4_megamoe_module_perf: collector/sglang/collect_dsv4_megamoe.py; the slowest rank.

    From prepared tokens and choices to the combined result: dispatch, both products and combine in one kernel over all
    ranks; gate and top-k are outside. `num_tokens` of each rank, `num_max_tokens_per_rank` sizes the buffer.
    """
    import polars as pl

    table = rows.select(
        pl.col("phase"),
        dtype("moe_dtype").alias("dtype"),
        pl.col("hidden_size").alias("hidden"),
        pl.col("inter_size").alias("intermediate"),
        pl.col("num_experts").alias("experts"),
        pl.col("topk").alias("top_k"),
        pl.col("moe_ep_size").alias("ep"),
        pl.col("distribution").replace({"balanced": "uniform"}),
        pl.col("num_max_tokens_per_rank").alias("capacity"),
        pl.col("num_tokens").alias("tokens"),
        seconds(),
        *origin(rows),
    )
    return {"moe_module": table}


def convert_mlp(phase: str) -> Callable[[pl.DataFrame, Source], Converted]:
    """wideep_context_mlp_perf, wideep_generation_mlp_perf: collector/sglang/collect_wideep_mlp.py.

    DeepSeek-V3's dense or shared expert as SGLang runs it: gate+up, activation, down, with their quantisation.
    """

    def convert(rows: pl.DataFrame, source: Source) -> Converted:
        import polars as pl

        table = rows.select(
            pl.lit(phase).alias("phase"),
            dtype("quant_type").alias("dtype"),
            pl.col("hidden_size").alias("hidden"),
            pl.col("intermediate_size").alias("intermediate"),
            pl.col("num_token").alias("tokens"),
            seconds("avg_ms"),
            *origin(rows),
        )
        return {"mlp": table}

    return convert


def convert_quantize(op: str) -> Callable[[pl.DataFrame, Source], Converted]:
    """computescale_perf, scale_matrix_perf: collector/trtllm/collect_computescale.py; activations [m, k].

    `scale_matrix` was timed: quantising with a scale that is there. `compute_scale` was not: it is the time of
    quantising with a scale to be found, minus that, and 0 where the difference is below 0.
    """

    def convert(rows: pl.DataFrame, source: Source) -> Converted:
        import polars as pl

        table = rows.select(
            pl.lit(op).alias("op"),
            dtype("quant_dtype").alias("dtype"),
            pl.col("k"),
            pl.col("m").alias("tokens"),
            seconds(),
            *origin(rows),
        )
        return {"quantize": table}

    return convert


def convert_hyper_connection(rows: pl.DataFrame, source: Source) -> Converted:
    """mhc_module_perf: collector/trtllm/collect_mhc_module.py; the time of all `num_sites` of a layer together."""
    import polars as pl

    table = rows.select(
        pl.col("op_name").alias("op"),
        pl.col("hidden_size").alias("hidden"),
        pl.col("hc_mult").alias("mult"),
        pl.col("num_sites").alias("sites"),
        pl.col("sinkhorn_iters").alias("iterations"),
        pl.col("num_tokens").alias("tokens"),
        seconds(),
        *origin(rows),
    )
    return {"hyper_connection": table}
