"""What the tables of attention mean: kernels, whole blocks of them, and the kernels inside sparse ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from profiles.importers.aiconfigurator_tables import Converted, Source, dtype, origin, seconds

if TYPE_CHECKING:
    import polars as pl

Convert = Callable[["pl.DataFrame", Source], Converted]

# MLA widths of DeepSeek-V3, which every MLA collector fixes (collector/sglang/collect_mla.py, collect_mla_bmm.py).
MLA_WIDTHS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "value_head_dim": 128}
BLACKWELL = ("b200", "b300", "gb200", "gb300", "rtx_pro_6000")

ATTENTION_COUNTS = ("num_heads", "head_dim", "batch_size", "isl", "beam_width")
ATTENTION_ZEROS = ("num_key_value_heads", "step")
ATTENTION_TEXTS = ("attn_dtype", "kv_cache_dtype")
MLA_COUNTS, MLA_ZEROS, MLA_TEXTS = ("num_heads", "batch_size", "isl"), ("step",), ("mla_dtype", "kv_cache_dtype")
MODULE_COUNTS = ("num_heads", "batch_size", "isl", "tp_size")
MODULE_TEXTS = ("mla_dtype", "kv_cache_dtype", "gemm_type", "model")
DELTA_COUNTS = (
    "batch_size", "seq_len", "d_model", "d_conv", "num_k_heads", "head_k_dim", "num_v_heads", "head_v_dim",
)  # fmt: skip
STATE_COUNTS = (
    "batch_size", "seq_len", "d_model", "d_state", "d_conv", "nheads", "head_dim", "n_groups", "chunk_size",
)  # fmt: skip


def beams(source: Source) -> dict[str, pl.Expr]:
    """Several beams share a prompt."""
    import polars as pl

    return {"beam search": pl.col("beam_width") > 1}


def prompts_only(source: Source) -> dict[str, pl.Expr]:
    """Prompts after a prefix are priced by a formula on prompts without one."""
    import polars as pl

    return {"a prompt after a prefix": pl.col("step") > 0}


def _attention(rows: pl.DataFrame, *sizes: pl.Expr) -> pl.DataFrame:
    import polars as pl

    # `num_key_value_heads` 0 stands for "as many as heads" in older tables.
    kv_heads = pl.when(pl.col("num_key_value_heads") == 0).then("num_heads").otherwise("num_key_value_heads")
    return rows.select(
        dtype("attn_dtype").alias("dtype"),
        dtype("kv_cache_dtype").alias("kv_dtype"),
        pl.col("num_heads").alias("heads"),
        kv_heads.alias("kv_heads"),
        pl.col("head_dim"),
        pl.col("window_size").alias("window"),
        pl.col("batch_size").alias("batch"),
        *sizes,
        seconds(),
        *origin(rows),
    )


def convert_context_attention(rows: pl.DataFrame, source: Source) -> Converted:
    """context_attention_perf: collector/sglang/collect_attn.py; `isl` new tokens, no prefix (`step` is 0)."""
    import polars as pl

    return {"attention_prefill": _attention(rows, pl.col("isl").alias("new_tokens"))}


def convert_generation_attention(rows: pl.DataFrame, source: Source) -> Converted:
    """generation_attention_perf: the same collector; `step` cached tokens and one new: it attends to step + 1."""
    import polars as pl

    return {"attention_decode": _attention(rows, (pl.col("step") + 1).alias("kv_tokens"))}


def convert_encoder_attention(rows: pl.DataFrame, source: Source) -> Converted:
    """encoder_attention_perf: collector/sglang/collect_attn_encoder.py; every token sees every other, as in a ViT."""
    import polars as pl

    table = rows.select(
        dtype("attn_dtype").alias("dtype"),
        pl.col("num_heads").alias("heads"),
        pl.col("head_dim"),
        pl.col("batch_size").alias("batch"),
        pl.col("isl").alias("new_tokens"),
        seconds(),
        *origin(rows),
    )
    return {"encoder_attention": table}


def _mla(rows: pl.DataFrame, form: str, *sizes: pl.Expr) -> pl.DataFrame:
    import polars as pl

    return rows.select(
        pl.lit(form).alias("form"),
        dtype("mla_dtype").alias("dtype"),
        dtype("kv_cache_dtype").alias("kv_dtype"),
        pl.col("num_heads").alias("heads"),
        *(pl.lit(width).alias(name) for name, width in MLA_WIDTHS.items()),
        pl.col("batch_size").alias("batch"),
        *sizes,
        seconds(),
        *origin(rows),
    )


def convert_context_mla(rows: pl.DataFrame, source: Source) -> Converted:
    """context_mla_perf. SGLang's collector runs it absorbed except on Blackwell; TensorRT-LLM's runs it expanded.

    collector/sglang/collect_mla.py: v_head_dim = kv_lora_rank and one KV head unless is_blackwell.
    """
    import polars as pl

    form = "absorbed" if source.engine == "sglang" and not source.system.startswith(BLACKWELL) else "expanded"
    return {"mla_prefill": _mla(rows, form, pl.col("isl").alias("new_tokens"))}


def convert_generation_mla(rows: pl.DataFrame, source: Source) -> Converted:
    """generation_mla_perf: absorbed; `step` cached tokens and one new."""
    import polars as pl

    return {"mla_decode": _mla(rows, "absorbed", (pl.col("step") + 1).alias("kv_tokens"))}


SIDES = {"mla_gen_pre": "pre", "mla_gen_post": "post"}


def other_products(source: Source) -> dict[str, pl.Expr]:
    """Products of MLA that are neither side of absorbed decode."""
    import polars as pl

    return {"neither side of absorbed decode": ~pl.col("op_name").is_in(list(SIDES))}


def convert_mla_bmm(rows: pl.DataFrame, source: Source) -> Converted:
    """mla_bmm_perf: collector/sglang/collect_mla_bmm.py; mla_gen_pre is 128 -> 512, mla_gen_post 512 -> 128 a head."""
    import polars as pl

    table = rows.select(
        pl.col("op_name").replace(SIDES).alias("side"),
        dtype("bmm_dtype").alias("dtype"),
        pl.col("num_heads").alias("heads"),
        pl.lit(MLA_WIDTHS["kv_lora_rank"]).alias("kv_lora_rank"),
        pl.lit(MLA_WIDTHS["value_head_dim"]).alias("head_dim"),
        pl.col("num_tokens").alias("tokens"),
        seconds(),
        *origin(rows),
    )
    return {"mla_absorb": table}


# Collectors that file a decode step under the tokens it attends to; the others file the cached tokens, one fewer.
# collector/vllm/collect_mla_module.py and collector/trtllm/collect_mla_module.py: positions are `step` - 1.
COUNTS_ITSELF = (("mla", "vllm"), ("mla", "trtllm"), ("dsa", "vllm"), ("dsa", "trtllm"))


def _module_key(rows: pl.DataFrame, module: pl.Expr) -> list[pl.Expr]:
    import polars as pl

    ratio = pl.col("compress_ratio") if "compress_ratio" in rows.columns else pl.lit(0)
    return [
        module.alias("module"),
        pl.col("model"),
        dtype("mla_dtype").alias("dtype"),
        dtype("kv_cache_dtype").alias("kv_dtype"),
        dtype("gemm_type").alias("gemm_dtype"),
        pl.col("num_heads").alias("heads"),
        pl.col("tp_size").alias("tp"),
        ratio.alias("compress_ratio"),
        pl.col("batch_size").alias("batch"),
    ]


def _variant(rows: pl.DataFrame, module: str) -> pl.Expr:
    """DSA rows whose indexer did not run say so in `op_name`."""
    import polars as pl

    if "op_name" not in rows.columns:
        return pl.lit(module)
    skips = pl.col("op_name").str.ends_with("_skip_indexer")
    return pl.when(skips).then(pl.lit(f"{module}_skip_indexer")).otherwise(pl.lit(module))


def convert_module_prefill(module: str) -> Convert:
    """*_context_module_perf: a whole attention block, projections included; `isl` new tokens after `step` cached ones.

    collector/{vllm,trtllm,sglang}/collect_mla_module.py (mla, dsa), collect_msa_module.py, collect_dsv4_attn.py. `dsa`
    runs the indexer, `dsa_skip_indexer` takes the choices of another layer's.
    """

    def convert(rows: pl.DataFrame, source: Source) -> Converted:
        import polars as pl

        table = rows.select(
            *_module_key(rows, _variant(rows, module)),
            pl.col("step").alias("prefix_tokens"),
            pl.col("isl").alias("new_tokens"),
            seconds(),
            *origin(rows),
        )
        return {"attention_module_prefill": table}

    return convert


def convert_module_decode(module: str) -> Convert:
    """*_generation_module_perf: the same blocks, one new token that attends to `kv_tokens`, itself included.

    `step` counts the cached tokens, but for COUNTS_ITSELF.
    """

    def convert(rows: pl.DataFrame, source: Source) -> Converted:
        import polars as pl

        itself = 0 if (module, source.engine) in COUNTS_ITSELF else 1
        table = rows.select(
            *_module_key(rows, _variant(rows, module)),
            (pl.col("step") + itself).alias("kv_tokens"),
            seconds(),
            *origin(rows),
        )
        return {"attention_module_decode": table}

    return convert


# collector/sglang/collect_wideep_attn.py loads DeepSeek-V3 with fp8 blocks; older tables have no column that says so.
WIDE_EP_MODEL = {"model": "deepseek-ai/DeepSeek-V3", "gemm_type": "fp8_block"}


def convert_wide_ep_context(rows: pl.DataFrame, source: Source) -> Converted:
    """wideep_context_mla_perf: collector/sglang/collect_wideep_attn.py; SGLang's block, launched eagerly.

    Not the first projections: the collector hands in random latents, drawn inside the time.
    """
    return convert_module_prefill("wideep_mla")(rows, source)


def convert_wide_ep_generation(rows: pl.DataFrame, source: Source) -> Converted:
    """wideep_generation_mla_perf: the same collector; `isl` counts the cached tokens and `step` is 0."""
    import polars as pl

    return convert_module_decode("wideep_mla")(rows.with_columns(pl.col("isl").alias("step")), source)


def convert_part(part: str) -> Convert:
    """Kernels inside sparse attention: `isl` new tokens of each sequence after `step` cached ones, both phases.

    collector/sglang/deepseekv4_sparse_modules.py (dsv4_*), glm5_dsa_sparse_modules.py (glm5_*),
    collector/vllm/collect_dsv4_attn.py. A top-k was run on made-up scores, `score_mode`; the paged logits take all new
    tokens of a batch as one sequence.
    """

    def convert(rows: pl.DataFrame, source: Source) -> Converted:
        import polars as pl

        table = rows.select(
            pl.lit(part).alias("part"),
            (pl.col("score_mode") if "score_mode" in rows.columns else pl.lit("")).alias("scores"),
            pl.col("model"),
            dtype("mla_dtype").alias("dtype"),
            dtype("kv_cache_dtype").alias("kv_dtype"),
            pl.col("num_heads").alias("heads"),
            pl.col("tp_size").alias("tp"),
            pl.col("compress_ratio"),
            pl.col("step").alias("prefix_tokens"),
            pl.col("batch_size").alias("batch"),
            pl.col("isl").alias("new_tokens"),
            seconds(),
            *origin(rows),
        )
        return {"attention_part": table}

    return convert


def convert_delta(op: str) -> Convert:
    """gdn_perf, kda_perf: collector/sglang/collect_gdn.py, collect_kda.py; one kernel of a linear-attention layer.

    `kernel` tells the convolution from the recurrence; the projections are products and not in the time. Heads are of
    one rank. `verify` runs `seq_len` draft tokens of each sequence.
    """

    def convert(rows: pl.DataFrame, source: Source) -> Converted:
        import polars as pl

        table = rows.select(
            pl.lit(op).alias("op"),
            pl.col("phase"),
            pl.col("model_name").alias("model"),
            pl.col("d_model").alias("hidden"),
            pl.col("d_conv").alias("conv"),
            pl.col("num_k_heads").alias("key_heads"),
            pl.col("head_k_dim").alias("key_head_dim"),
            pl.col("num_v_heads").alias("value_heads"),
            pl.col("head_v_dim").alias("value_head_dim"),
            pl.col("batch_size").alias("batch"),
            pl.col("seq_len").alias("new_tokens"),
            seconds(),
            *origin(rows),
        )
        return {"linear_attention": table}

    return convert


def convert_state_space(rows: pl.DataFrame, source: Source) -> Converted:
    """mamba2_perf: collector/trtllm/collect_mamba2.py; the causal convolution of a Mamba-2 layer, whole widths."""
    import polars as pl

    table = rows.select(
        pl.col("phase"),
        pl.col("model_name").alias("model"),
        pl.col("d_model").alias("hidden"),
        pl.col("d_state").alias("state"),
        pl.col("d_conv").alias("conv"),
        pl.col("nheads").alias("heads"),
        pl.col("head_dim"),
        pl.col("n_groups").alias("groups"),
        pl.col("chunk_size").alias("chunk"),
        pl.col("batch_size").alias("batch"),
        pl.col("seq_len").alias("new_tokens"),
        seconds(),
        *origin(rows),
    )
    return {"state_space": table}
