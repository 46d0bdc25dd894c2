"""What the tables of collectives and exchanges mean: one converter a kind of table."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from moesim.units import MICRO
from profiles.importers.aiconfigurator_tables import ROW, Converted, Source, dtype, origin, refuse_row, seconds
from profiles.protocols import MOVING, combined
from profiles.record import LATENCY

if TYPE_CHECKING:
    import polars as pl

# nccl-tests' size is in bytes; the collector divides it by the element's size (collector/network/collect_nccl.py).
NCCL_ELEMENT_BYTES = {"half": 2, "int8": 1}
CUSTOM_ELEMENT_BYTES = 2  # bfloat16 (collector/network/collect_all_reduce.py: `size` elements of the dtype)
NCCL_KINDS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
}
# DeepEP's own tests send fp8 with scales and combine bf16 (collector/deep_collector/test_low_latency.py: use_fp8=True;
# extract_data.py: "Best dispatch (FP8)").
EXCHANGE_DTYPES = {"dispatch": "fp8", "combine": "bf16"}
NCCL_COUNTS, NCCL_TEXTS = ("num_gpus", "message_size"), ("nccl_dtype", "op_name")
DEEPEP_COUNTS = ("node_num", "hidden_size", "num_token", "num_topk", "num_experts")
A2A_COUNTS = ("ep_size", "node_num", "hidden_size", "topk", "num_experts", "num_tokens")


def other_collectives(source: Source) -> dict[str, pl.Expr]:
    """Kinds and element types whose sizes nobody has looked up."""
    import polars as pl

    return {
        "another collective": ~pl.col("op_name").is_in(list(NCCL_KINDS)),
        "an element type of unknown size": ~pl.col("nccl_dtype").is_in(list(NCCL_ELEMENT_BYTES)),
    }


def convert_nccl(path: str, kernel: str) -> Callable[[pl.DataFrame, Source], Converted]:
    """nccl_perf, oneccl_perf: collector/network/collect_nccl.py; one node; `message_size` counts elements.

    Half precision is what lookups take; int8 goes to the variants, as a reduction costs another time there. What only
    moves bytes was measured twice, once in each: a lookup's row is what both tell (`protocols.combined`).
    """

    def convert(rows: pl.DataFrame, source: Source) -> Converted:
        import polars as pl

        size = pl.col("message_size") * pl.col("nccl_dtype").replace_strict(NCCL_ELEMENT_BYTES, return_dtype=pl.Int64)
        table = rows.select(
            pl.col("op_name").replace(NCCL_KINDS).alias("kind"),
            pl.lit(path).alias("path"),
            dtype("nccl_dtype").alias("dtype"),
            pl.lit("nccl-tests").alias("launch"),
            *_ranks(source),
            size.alias("bytes"),
            seconds(),
            *origin(rows),
        ).with_columns(pl.lit(kernel).alias("kernel"))
        split = _split(table, pl.col("dtype") == "fp16")
        return {**split, "collective": _by_both_types(split["collective"], table)}

    return convert


def _by_both_types(rows: pl.DataFrame, table: pl.DataFrame) -> pl.DataFrame:
    """The rows with the seconds that all of the table's element types tell of one exchange, where it only moves bytes.

    Collections again of one row count as their median, here as elsewhere, before the types count as one.
    """
    import polars as pl

    exchange = ["kind", "gpus", "bytes"]
    moved = table.filter(pl.col("kind").is_in(MOVING)).group_by([*exchange, "dtype"]).agg(pl.col(LATENCY).median())
    if not moved.height:
        return rows
    places = moved.select(pl.struct(exchange).rank("dense")).to_series().to_numpy().astype(np.int64)
    joint = moved.with_columns(pl.Series("joint", combined(places, moved[LATENCY].to_numpy())))
    told = joint.group_by(exchange).agg(pl.col("joint").first())
    mended = rows.join(told, on=exchange, how="left", maintain_order="left")
    return mended.with_columns(pl.coalesce("joint", LATENCY).alias(LATENCY)).drop("joint")


def _ranks(source: Source) -> tuple[pl.Expr, pl.Expr]:
    """GPUs, and the nodes that they fill: the collectors run on as few as hold them."""
    import polars as pl

    gpus = pl.col("num_gpus")
    return gpus.alias("gpus"), ((gpus + source.gpus_per_node - 1) // source.gpus_per_node).alias("nodes")


def _split(table: pl.DataFrame, taken: pl.Expr) -> Converted:
    return {
        "collective": table.filter(taken).drop("dtype", "launch"),
        "collective_variant": table.filter(~taken),
    }


def other_all_reduces(source: Source) -> dict[str, pl.Expr]:
    """Some SGLang folders hold rows of TensorRT-LLM's kernel."""
    import polars as pl

    return {
        "another engine's kernel": pl.col("framework").str.to_lowercase() != source.engine,
        "an element type of unknown size": pl.col("allreduce_dtype") != "bfloat16",
    }


def convert_custom_all_reduce(rows: pl.DataFrame, source: Source) -> Converted:
    """custom_allreduce_perf: collector/network/collect_all_reduce.py; `message_size` elements of bfloat16.

    Lookups take the rows in a CUDA graph; rows that were launched eagerly go to the variants.
    """
    import polars as pl

    eager = pl.col("kernel_source").str.to_lowercase().str.contains("eager", literal=True)
    table = rows.select(
        pl.lit("all_reduce").alias("kind"),
        pl.lit("custom").alias("path"),
        dtype("allreduce_dtype").alias("dtype"),
        pl.when(eager).then(pl.lit("eager")).otherwise(pl.lit("graph")).alias("launch"),
        *_ranks(source),
        (pl.col("message_size") * CUSTOM_ELEMENT_BYTES).alias("bytes"),
        seconds(),
        *origin(rows),
    )
    return _split(table, pl.col("launch") == "graph")


def _exchange(
    rows: pl.DataFrame, source: Source, mode: str, times: dict[str, pl.Expr], sms: dict[str, pl.Expr]
) -> Converted:
    """Two rows for each of the table's. The whole node takes part: 4 GPUs of a GB200 or GB300, else 8."""
    import polars as pl

    shape = (
        pl.lit(mode).alias("mode"),
        pl.col("node_num").alias("nodes"),
        (pl.col("node_num") * source.gpus_per_node).alias("ep"),
        pl.col("hidden_size").alias("hidden"),
        pl.col("num_topk").alias("top_k"),
        pl.col("num_experts").alias("experts"),
        pl.col("num_token").alias("tokens"),
    )
    steps = [
        rows.select(
            pl.lit(step).alias("step"),
            *shape,
            pl.lit(EXCHANGE_DTYPES[step]).alias("dtype"),
            sms[step].cast(pl.Int64).alias("sms"),
            time.alias(LATENCY),
            *origin(rows),
        )
        for step, time in times.items()
    ]
    return {"exchange": pl.concat(steps)}


def convert_deepep_normal(rows: pl.DataFrame, source: Source) -> Converted:
    """wideep_deepep_normal_perf: collector/deep_collector/extract_data.py; a step takes transmit and notify.

    One node: collector/wideep/sglang/collect_deepep_normal.py, over all its GPUs.
    """
    import polars as pl

    steps = ("dispatch", "combine")
    times = {step: (pl.col(f"{step}_transmit_us") + pl.col(f"{step}_notify_us")) * MICRO for step in steps}
    return _exchange(rows, source, "normal", times, {step: pl.col(f"{step}_sms") for step in steps})


def convert_deepep_low_latency(rows: pl.DataFrame, source: Source) -> Converted:
    """wideep_deepep_ll_perf: the mean time of a dispatch and of a combine kernel, return_recv_hook=False."""
    import polars as pl

    steps = ("dispatch", "combine")
    times = {step: seconds(f"{step}_avg_t_us") for step in steps}
    return _exchange(rows, source, "low_latency", times, dict.fromkeys(steps, pl.lit(0)))


# Their name of a way to exchange -> ours.
BACKENDS = {
    "deepep_ht": "deepep_normal",
    "deepep_ll": "deepep_low_latency",
    "deepep_v2_context": "deepep_v2_eager",
    "deepep_v2_generation": "deepep_v2_graph",
    "trtllm_deepep_ht": "deepep_normal",
    "trtllm_deepep_ll": "deepep_low_latency",
}
STEPS = ("dispatch", "combine")


def other_exchanges(source: Source) -> dict[str, pl.Expr]:
    """Backends and steps that nobody has looked up."""
    import polars as pl

    return {
        "a backend of unknown meaning": ~pl.col("comm_backend").is_in(list(BACKENDS)),
        "a step of unknown meaning": ~pl.col("phase").is_in(list(STEPS)),
    }


def convert_moe_a2a(rows: pl.DataFrame, source: Source) -> Converted:
    """moe_a2a_perf: collector/wideep/vllm/collect_moe_a2a.py, collector/wideep/trtllm/collect_moe_a2a.py.

    What the engines call around DeepEP, launched eagerly; `num_tokens` of each rank to random experts; microseconds in
    all columns, `latency` too. `comm_dtype` is what is dispatched (`default`: bf16, as vLLM is run unquantised there);
    combine carries bf16, but for `fp4`, the low-precision combine of a run that dispatches nvfp4. Raises BadInput where
    `latency` is not the sum of its two parts.
    """
    import polars as pl

    total = pl.col("transmit_us") + pl.col("notify_us")
    off = rows.filter((pl.col("latency") - total).abs() > 1e-6 * total)
    if off.height:
        refuse_row(
            source.path, f"latency is {off['latency'][0]}, not transmit_us and notify_us together",
            int(off[ROW][0]), "all three are microseconds",
        )  # fmt: skip
    low = (pl.col("phase") == "combine") & (pl.col("comm_dtype") == "fp4")
    sent = pl.col("comm_dtype").replace({"default": "bf16", "fp4": "nvfp4"}).replace({"bfloat16": "bf16"})
    table = rows.select(
        pl.when(low).then(pl.lit("combine_low_precision")).otherwise(pl.col("phase")).alias("step"),
        pl.col("comm_backend").replace(BACKENDS).alias("backend"),
        pl.col("node_num").alias("nodes"),
        pl.col("ep_size").alias("ep"),
        pl.col("hidden_size").alias("hidden"),
        pl.col("topk").alias("top_k"),
        pl.col("num_experts").alias("experts"),
        sent.alias("dispatch_dtype"),
        pl.lit("random").alias("routing"),
        pl.col("sms"),
        pl.col("num_tokens").alias("tokens"),
        (total * MICRO).alias(LATENCY),
        *origin(rows),
    )
    return {"all_to_all": table}


NVLINK = {"NVLinkTwoSided": "nvlink_two_sided", "NVLinkOneSided": "nvlink_one_sided"}
NVLINK_STEPS = {
    "alltoall_prepare": "prepare",
    "alltoall_dispatch": "dispatch",
    "alltoall_combine": "combine",
    "alltoall_combine_low_precision": "combine_low_precision",
}


def other_nvlink(source: Source) -> dict[str, pl.Expr]:
    """Kernels and steps that nobody has looked up."""
    import polars as pl

    return {
        "a backend of unknown meaning": ~pl.col("kernel_source").is_in(list(NVLINK)),
        "a step of unknown meaning": ~pl.col("op_name").is_in(list(NVLINK_STEPS)),
    }


def convert_nvlink(rows: pl.DataFrame, source: Source) -> Converted:
    """trtllm_alltoall_perf: collect_trtllm_alltoall.py; multi-node NVLink, one- and two-sided.

    `num_tokens` of each rank; `moe_dtype` is what is dispatched, combine carries bf16. `balanced`: every token goes to
    min(topk, EP) different ranks, each rank gets as many.
    """
    import polars as pl

    ep = pl.col("moe_ep_size")
    table = rows.select(
        pl.col("op_name").replace(NVLINK_STEPS).alias("step"),
        pl.col("kernel_source").replace(NVLINK).alias("backend"),
        ((ep + source.gpus_per_node - 1) // source.gpus_per_node).alias("nodes"),
        ep.alias("ep"),
        pl.col("hidden_size").alias("hidden"),
        pl.col("topk").alias("top_k"),
        pl.col("num_experts").alias("experts"),
        dtype("moe_dtype").alias("dispatch_dtype"),
        pl.col("distribution").alias("routing"),
        pl.lit(0).alias("sms"),
        pl.col("num_tokens").alias("tokens"),
        seconds(),
        *origin(rows),
    )
    return {"all_to_all": table}
