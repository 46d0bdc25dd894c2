"""Import the measured tables of NVIDIA's aiconfigurator-core (Apache-2.0): systems/data/<system>/<family>/<engine>/<version>.

What each column means was looked up in the collectors that wrote it, in the public repository ai-dynamo/aiconfigurator;
docs/explanation/costs.md says it table by table with the source paths. Latencies there are milliseconds unless the
column ends in `_us`; here they are seconds. Rows that repeat a point (re-collections) become their median.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.errors import BadInput, MissingPart
from moesim.units import MICRO, MILLI
from profiles.record import FAMILIES, LATENCY, Family
from profiles.store import empty, polars_schema, read_parquet

if TYPE_CHECKING:
    import polars as pl

PACKAGE = "aiconfigurator-core"
MODULE = "aiconfigurator_core"
ENGINES = ("sglang", "trtllm", "vllm")

# Their names of element types -> ours.
DTYPES = {
    "bfloat16": "bf16",
    "float16": "bf16",  # older collectors wrote float16 for tensors made as torch.bfloat16 (collector/sglang/collect_mla.py)
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


def find_package(given: Path | None) -> tuple[Path, str]:
    """The folder that holds `<system>/<family>/…` and the package's version. Raises BadInput or MissingPart.

    `given` may be that folder, the package folder above it, or the folder that holds the package.
    """
    if given is None:
        spec = importlib.util.find_spec(MODULE)
        if spec is None or not spec.submodule_search_locations:
            raise MissingPart(
                f"{PACKAGE} is not installed", mend="pip install 'moesim[silicon]', or give its folder with --source"
            )
        return Path(next(iter(spec.submodule_search_locations))) / "systems" / "data", _installed_version()
    for below in ("", "systems/data", f"{MODULE}/systems/data", "data"):
        folder = Path(given) / below
        if folder.is_dir() and any(folder.glob("*/*/*/*/*.parquet")):
            return folder, _unpacked_version(folder)
    raise BadInput(
        "no tables here",
        where=str(given),
        mend="give the folder that holds <system>/<family>/<engine>/<version>/*.parquet",
    )


def _installed_version() -> str:
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "unknown"


def _unpacked_version(folder: Path) -> str:
    """The version of an unpacked wheel, read from the name of its dist-info folder."""
    for parent in folder.resolve().parents:
        for found in parent.glob(f"{MODULE}-*.dist-info"):
            return found.name.removeprefix(f"{MODULE}-").removesuffix(".dist-info")
    return "unknown"


def import_tables(
    data: Path,
    *,
    system: str,
    engine: str,
    package_version: str,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, pl.DataFrame]:
    """All families of one system and engine, normalised. `say` is told of what is left out. Raises BadInput."""
    if not (data / system).is_dir():
        known = sorted(path.name for path in data.iterdir() if path.is_dir() and any(path.glob("*/*/*/*.parquet")))
        raise BadInput(f"no tables for the system {system!r}", where=str(data), mend=f"use one of: {', '.join(known)}")
    if engine not in ENGINES:
        raise BadInput(f"unknown engine {engine!r}", where="--engine", mend=f"use one of: {', '.join(ENGINES)}")
    found: dict[str, list[pl.DataFrame]] = {name: [] for name in FAMILIES}
    for stem, (families, convert, folders) in CONVERTERS.items():
        for filed_under in folders(engine):
            for source in _sources(data, system, filed_under, stem, package_version):
                rows = read_parquet(source.path)
                rows = _of_this_device(rows, source, say)
                for name, table in zip(families, convert(rows, source), strict=True):
                    found[name].append(_normalised(table, FAMILIES[name], source))
    return {name: _merged(tables, FAMILIES[name]) for name, tables in found.items()}


def _sources(data: Path, system: str, engine: str, stem: str, package_version: str) -> Iterable[Source]:
    for path in sorted((data / system).glob(f"*/{engine}/*/{stem}.parquet")):
        yield Source(path, system, engine, path.parent.name, package_version)


def _of_this_device(rows: pl.DataFrame, source: Source, say: Callable[[str], None]) -> pl.DataFrame:
    """Leave out rows that were measured on another GPU than the system's (the tables hold a few)."""
    import polars as pl

    if "device" not in rows.columns:
        return rows
    chip = source.system.split("_")[0].upper()
    kept = rows.filter(pl.col("device").str.to_uppercase().str.contains(chip, literal=True))
    if kept.height < rows.height:
        others = sorted(set(rows["device"].unique()) - set(kept["device"].unique()))
        say(f"{source.path.name} {source.version}: left out {rows.height - kept.height} rows of {', '.join(others)}")
    return kept


def _normalised(table: pl.DataFrame, family: Family, source: Source) -> pl.DataFrame:
    """Add where the rows come from and bring columns into order. Raises BadInput when one is missing."""
    import polars as pl

    have = table.columns
    defaults = {
        "system": source.system,
        "engine": source.engine,
        "version": source.version,
        "kernel": "unknown",
        "device": "unknown",
        "package": PACKAGE,
        "package_version": source.package_version,
        "tag": "measured",
    }
    table = table.with_columns(pl.lit(value).alias(name) for name, value in defaults.items() if name not in have)
    return table.select(pl.col(name).cast(kind) for name, kind in polars_schema(family).items())


def _merged(tables: list[pl.DataFrame], family: Family) -> pl.DataFrame:
    """All tables of a family; repeated points become their median."""
    import polars as pl

    if not tables:
        return empty(family)
    identity = [name for name in family.columns if name != LATENCY]
    table = pl.concat(tables).group_by(identity).agg(pl.col(LATENCY).median())
    return table.select(list(family.columns)).sort([*family.key, "engine", "version", *family.point])


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


def _experts(rows: pl.DataFrame, source: Source, grouping: str, distributions: Iterable[str] | None) -> pl.DataFrame:
    """Tables of experts: `num_tokens` counts the tokens of all ranks of the EP group together."""
    import polars as pl

    _columns(
        rows, source, "moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts",
        "moe_tp_size", "moe_ep_size", "distribution", "latency", "kernel_source", "device",
    )  # fmt: skip
    if distributions is not None:
        rows = rows.filter(pl.col("distribution").is_in(list(distributions)))
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
    """moe_perf: collector/sglang/collect_moe.py; the balanced rows only (the skew is the simulator's own)."""
    return (_experts(rows, source, "fused", ("balanced",)),)


def convert_masked(rows: pl.DataFrame, source: Source) -> tuple[pl.DataFrame, ...]:
    """wideep_generation_moe_perf: collector/sglang/collect_wideep_deepep_moe.py, decode; inside a CUDA graph."""
    return (_experts(rows, source, "deepep_low_latency", None),)


def convert_contiguous(rows: pl.DataFrame, source: Source) -> tuple[pl.DataFrame, ...]:
    """wideep_context_moe_perf: the same collector, prefill; launched eagerly, launches included."""
    return (_experts(rows, source, "deepep_normal", None),)


def _attention(rows: pl.DataFrame, source: Source, *sizes: pl.Expr) -> pl.DataFrame:
    import polars as pl

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
    """nccl_perf: collector/network/collect_nccl.py; one node; `message_size` counts elements. Half precision only."""
    import polars as pl

    _columns(rows, source, "nccl_dtype", "num_gpus", "message_size", "op_name", "latency")
    rows = rows.filter((pl.col("nccl_dtype") == "half") & pl.col("op_name").is_in(list(NCCL_KINDS)))
    return (
        rows.select(
            pl.col("op_name").replace(NCCL_KINDS).alias("kind"),
            pl.lit("nccl").alias("path"),
            pl.col("num_gpus").alias("gpus"),
            pl.lit(1).alias("nodes"),
            (pl.col("message_size") * NCCL_ELEMENT_BYTES["half"]).alias("bytes"),
            _latency(),
            pl.lit("NCCL").alias("kernel"),
        ),
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


def convert_scale_matrix(rows: pl.DataFrame, source: Source) -> tuple[pl.DataFrame, ...]:
    """scale_matrix_perf: quantising an [m, k] bf16 matrix to fp8: 2 bytes read and 1 written for each element."""
    import polars as pl

    _columns(rows, source, "m", "k", "quant_dtype", "latency", "kernel_source", "device")
    rows = rows.filter((pl.col("quant_dtype") == "fp8") & (pl.col("latency") > 0))
    return (
        rows.select(
            pl.lit("quantise_fp8").alias("name"),
            pl.lit("bf16").alias("dtype"),
            (pl.col("m") * pl.col("k") * 3).alias("bytes"),
            _latency(),
            *_kernel(),
        ),
    )


def _own(engine: str) -> tuple[str, ...]:
    return (engine,)


def _nccl(engine: str) -> tuple[str, ...]:
    return ("nccl",)


def _with_trtllm(engine: str) -> tuple[str, ...]:
    """Context MLA also from TensorRT-LLM: its expanded kernel is what SGLang's prefill runs, too (see costs.md)."""
    return tuple(dict.fromkeys((engine, "trtllm")))


Convert = Callable[["pl.DataFrame", Source], "tuple[pl.DataFrame, ...]"]
# File -> the families it fills, its converter, and the folders it is looked for in.
CONVERTERS: dict[str, tuple[tuple[str, ...], Convert, Callable[[str], tuple[str, ...]]]] = {
    "gemm_perf": (("gemm",), convert_gemm, _own),
    "moe_perf": (("experts",), convert_fused, _own),
    "wideep_generation_moe_perf": (("experts",), convert_masked, _own),
    "wideep_context_moe_perf": (("experts",), convert_contiguous, _own),
    "context_attention_perf": (("attention_prefill",), convert_context_attention, _own),
    "generation_attention_perf": (("attention_decode",), convert_generation_attention, _own),
    "context_mla_perf": (("mla_prefill",), convert_context_mla, _with_trtllm),
    "generation_mla_perf": (("mla_decode",), convert_generation_mla, _own),
    "mla_bmm_perf": (("mla_absorb",), convert_mla_bmm, _own),
    "nccl_perf": (("collective",), convert_nccl, _nccl),
    "custom_allreduce_perf": (("collective",), convert_custom_all_reduce, _own),
    "wideep_deepep_normal_perf": (("exchange",), convert_deepep_normal, _own),
    "wideep_deepep_ll_perf": (("exchange",), convert_deepep_low_latency, _own),
    "scale_matrix_perf": (("memory_bound",), convert_scale_matrix, _own),
}
