"""Every kind of table file of aiconfigurator-core that is read: by its name, what it must hold and who converts it."""

from __future__ import annotations

from profiles.importers import aiconfigurator_attention as attention
from profiles.importers import aiconfigurator_kernels as kernels
from profiles.importers import aiconfigurator_network as network
from profiles.importers.aiconfigurator_tables import Table


def _nccl(engine: str) -> tuple[str, ...]:
    """NCCL's own folder; one table of B300 is filed under TensorRT-LLM."""
    return ("nccl", engine)


def _oneccl(engine: str) -> tuple[str, ...]:
    return ("oneccl",)


def _with_trtllm(engine: str) -> tuple[str, ...]:
    """Context MLA also from TensorRT-LLM: its expanded kernel is what SGLang's prefill runs, too (see costs.md)."""
    return tuple(dict.fromkeys((engine, "trtllm")))


def _module(module: str, phase: str, *more: str, named: bool = False) -> Table:
    """A whole attention block; more: columns of counts that only it has; named: `op_name` tells its variants."""
    prefill = phase == "prefill"
    convert = attention.convert_module_prefill if prefill else attention.convert_module_decode
    return Table(
        (f"attention_module_{phase}",),
        convert(module),
        (*attention.MODULE_COUNTS, *more),
        attention.MLA_ZEROS,
        (*attention.MODULE_TEXTS, *(("op_name",) if named else ())),
    )


def _part(part: str, *texts: str) -> Table:
    """A kernel inside a sparse attention block."""
    return Table(
        ("attention_part",),
        attention.convert_part(part),
        (*attention.MODULE_COUNTS, "compress_ratio"),
        attention.MLA_ZEROS,
        (*attention.MLA_TEXTS, "model", *texts),
    )


def _delta(op: str) -> Table:
    return Table(
        ("linear_attention",), attention.convert_delta(op), attention.DELTA_COUNTS, texts=("phase", "model_name")
    )


_EXPERTS = ("experts",)
_COLLECTIVES = ("collective", "collective_variant")
_NORMAL_TIMES = ("dispatch_transmit_us", "dispatch_notify_us", "combine_transmit_us", "combine_notify_us")

TABLES: dict[str, Table] = {
    "gemm_perf": Table(("gemm",), kernels.convert_gemm, kernels.GEMM_COUNTS, texts=kernels.GEMM_TEXTS),
    "moe_perf": Table(
        _EXPERTS, kernels.convert_fused, kernels.MOE_COUNTS, texts=kernels.MOE_TEXTS, left_out=kernels.uneven_experts
    ),
    "wideep_generation_moe_perf": Table(
        _EXPERTS, kernels.convert_masked, kernels.MOE_COUNTS, texts=kernels.MOE_TEXTS, left_out=kernels.uneven_experts
    ),
    "wideep_context_moe_perf": Table(
        _EXPERTS,
        kernels.convert_contiguous,
        kernels.MOE_COUNTS,
        texts=kernels.MOE_TEXTS,
        left_out=kernels.uneven_experts,
    ),
    "wideep_moe_perf": Table(
        _EXPERTS,
        kernels.convert_wide_ep,
        (*kernels.MOE_COUNTS, "num_slots"),
        texts=kernels.MOE_TEXTS,
        left_out=kernels.uneven_slots,
    ),
    "dsv4_megamoe_module_perf": Table(
        ("moe_module",),
        kernels.convert_moe_module,
        ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_ep_size", "num_max_tokens_per_rank"),
        texts=("phase", *kernels.MOE_TEXTS),
    ),
    "wideep_context_mlp_perf": Table(
        ("mlp",),
        kernels.convert_mlp("prefill"),
        ("num_token", "hidden_size", "intermediate_size"),
        texts=("quant_type",),
        times=("avg_ms",),
    ),
    "wideep_generation_mlp_perf": Table(
        ("mlp",),
        kernels.convert_mlp("decode"),
        ("num_token", "hidden_size", "intermediate_size"),
        texts=("quant_type",),
        times=("avg_ms",),
    ),
    "computescale_perf": Table(
        ("quantize",),
        kernels.convert_quantize("compute_scale"),
        ("m", "k"),
        texts=("quant_dtype",),
        difference=True,
    ),
    "scale_matrix_perf": Table(
        ("quantize",), kernels.convert_quantize("scale_matrix"), ("m", "k"), texts=("quant_dtype",)
    ),
    "mhc_module_perf": Table(
        ("hyper_connection",),
        kernels.convert_hyper_connection,
        ("num_tokens", "num_sites", "hc_mult", "hidden_size", "sinkhorn_iters"),
        texts=("op_name",),
    ),
    "context_attention_perf": Table(
        ("attention_prefill",),
        attention.convert_context_attention,
        attention.ATTENTION_COUNTS,
        attention.ATTENTION_ZEROS,
        attention.ATTENTION_TEXTS,
        optional={"window_size": 0},
        left_out=attention.prompts_only,
    ),
    "generation_attention_perf": Table(
        ("attention_decode",),
        attention.convert_generation_attention,
        attention.ATTENTION_COUNTS,
        attention.ATTENTION_ZEROS,
        attention.ATTENTION_TEXTS,
        optional={"window_size": 0},
        left_out=attention.beams,
    ),
    "encoder_attention_perf": Table(
        ("encoder_attention",),
        attention.convert_encoder_attention,
        ("num_heads", "head_dim", "batch_size", "isl"),
        texts=("attn_dtype",),
    ),
    "context_mla_perf": Table(
        ("mla_prefill",),
        attention.convert_context_mla,
        attention.MLA_COUNTS,
        attention.MLA_ZEROS,
        attention.MLA_TEXTS,
        left_out=attention.prompts_only,
        folders=_with_trtllm,
    ),
    "generation_mla_perf": Table(
        ("mla_decode",),
        attention.convert_generation_mla,
        attention.MLA_COUNTS,
        attention.MLA_ZEROS,
        attention.MLA_TEXTS,
    ),
    "mla_bmm_perf": Table(
        ("mla_absorb",),
        attention.convert_mla_bmm,
        ("num_tokens", "num_heads"),
        texts=("op_name", "bmm_dtype"),
        left_out=attention.other_products,
    ),
    "wideep_context_mla_perf": Table(
        ("attention_module_prefill",),
        attention.convert_wide_ep_context,
        attention.MODULE_COUNTS,
        attention.MLA_ZEROS,
        attention.MLA_TEXTS,
        optional=attention.WIDE_EP_MODEL,
    ),
    "wideep_generation_mla_perf": Table(
        ("attention_module_decode",),
        attention.convert_wide_ep_generation,
        attention.MODULE_COUNTS,
        attention.MLA_ZEROS,
        attention.MLA_TEXTS,
        optional=attention.WIDE_EP_MODEL,
    ),
    "mla_context_module_perf": _module("mla", "prefill"),
    "mla_generation_module_perf": _module("mla", "decode"),
    "dsa_context_module_perf": _module("dsa", "prefill", named=True),
    "dsa_generation_module_perf": _module("dsa", "decode", named=True),
    "msa_context_module_perf": _module("msa", "prefill"),
    "msa_generation_module_perf": _module("msa", "decode"),
    "dsv4_csa_context_module_perf": _module("dsv4_csa", "prefill", "compress_ratio"),
    "dsv4_csa_generation_module_perf": _module("dsv4_csa", "decode", "compress_ratio"),
    "dsv4_hca_context_module_perf": _module("dsv4_hca", "prefill", "compress_ratio"),
    "dsv4_hca_generation_module_perf": _module("dsv4_hca", "decode", "compress_ratio"),
    "dsv4_csa_topk_calib_perf": _part("dsv4_csa_topk", "score_mode"),
    "dsv4_hca_attn_module_perf": _part("dsv4_hca_attention"),
    "dsv4_paged_mqa_logits_module_perf": _part("dsv4_paged_mqa_logits"),
    "glm5_dsa_attn_module_perf": _part("glm5_dsa_attention"),
    "glm5_mqa_logits_module_perf": _part("glm5_mqa_logits"),
    "glm5_topk_module_perf": _part("glm5_topk", "score_mode"),
    "gdn_perf": _delta("gdn"),
    "kda_perf": _delta("kda"),
    "mamba2_perf": Table(
        ("state_space",), attention.convert_state_space, attention.STATE_COUNTS, texts=("phase", "model_name")
    ),
    "nccl_perf": Table(
        _COLLECTIVES,
        network.convert_nccl("nccl", "NCCL"),
        network.NCCL_COUNTS,
        texts=network.NCCL_TEXTS,
        left_out=network.other_collectives,
        folders=_nccl,
    ),
    "oneccl_perf": Table(
        _COLLECTIVES,
        network.convert_nccl("oneccl", "oneCCL"),
        network.NCCL_COUNTS,
        texts=network.NCCL_TEXTS,
        left_out=network.other_collectives,
        folders=_oneccl,
    ),
    "custom_allreduce_perf": Table(
        _COLLECTIVES,
        network.convert_custom_all_reduce,
        network.NCCL_COUNTS,
        texts=("allreduce_dtype", "framework", "kernel_source"),
        left_out=network.other_all_reduces,
    ),
    "wideep_deepep_normal_perf": Table(
        ("exchange",),
        network.convert_deepep_normal,
        (*network.DEEPEP_COUNTS, "dispatch_sms", "combine_sms"),
        times=_NORMAL_TIMES,
        untimed=("dispatch_transmit_us", "combine_transmit_us"),
    ),
    "wideep_deepep_ll_perf": Table(
        ("exchange",),
        network.convert_deepep_low_latency,
        network.DEEPEP_COUNTS,
        times=("dispatch_avg_t_us", "combine_avg_t_us"),
    ),
    "moe_a2a_perf": Table(
        ("all_to_all",),
        network.convert_moe_a2a,
        network.A2A_COUNTS,
        ("sms",),
        ("comm_backend", "phase", "comm_dtype"),
        times=("transmit_us", "notify_us", "latency"),
        untimed=("transmit_us",),
        left_out=network.other_exchanges,
    ),
    "trtllm_alltoall_perf": Table(
        ("all_to_all",),
        network.convert_nvlink,
        ("num_tokens", "hidden_size", "topk", "num_experts", "moe_ep_size"),
        texts=("op_name", "kernel_source", "moe_dtype", "distribution"),
        left_out=network.other_nvlink,
    ),
}
