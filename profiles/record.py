"""The rows of a profile: one schema for each family of measurements, with where every row comes from.

Units are SI: seconds, bytes, tokens. A family's `key` columns say which kernel at which shape, its `point` columns are
the sizes that a lookup interpolates over.
"""

from __future__ import annotations

from dataclasses import dataclass

TEXT = "text"
COUNT = "count"
NUMBER = "number"

# Where a row comes from; the same in every family.
PROVENANCE: dict[str, str] = {
    "system": TEXT,  # h200_sxm
    "engine": TEXT,  # whose kernel: sglang, trtllm, vllm, nccl, moesim
    "version": TEXT,  # of the engine, as the table is filed
    "kernel": TEXT,  # the kernel that ran
    "device": TEXT,  # the GPU that ran it
    "package": TEXT,  # where the row was published
    "package_version": TEXT,
    "tag": TEXT,  # measured
}

LATENCY = "latency_s"


@dataclass(frozen=True)
class Family:
    """One family of rows: its file is `<name>.parquet`. `key` may be 0 in a COUNT; `point` and `values` may not.

    values: figures measured beside the latency.
    """

    name: str
    key: dict[str, str]
    point: tuple[str, ...]
    cost_family: str = ""  # of the estimates that are looked up here; empty where none is
    measured_by: str = ""  # the command that measures it; empty where there is none
    values: tuple[str, ...] = ()

    @property
    def priced(self) -> bool:
        """Whether an operation of the simulator is looked up here; other families are stored, shown and checked."""
        return bool(self.cost_family)

    @property
    def columns(self) -> dict[str, str]:
        """All columns in order -> TEXT, COUNT or NUMBER."""
        sizes = dict.fromkeys(self.point, NUMBER)
        return {**self.key, **sizes, LATENCY: NUMBER, **dict.fromkeys(self.values, NUMBER), **PROVENANCE}


# Rows that were measured by this package; they price for every engine whose scenario names their profile.
MEASURED_ENGINE = "moesim"
# Rows that DeepEP's own tests printed; they price the exchanges of every engine that runs DeepEP.
DEEPEP = "deepep"
# Published figures of kernels that are no engine's; they price for every engine whose scenario names their profile.
PUBLISHED = "published"
KERNELS = "moesim profile kernels"
COLLECTIVES = "moesim profile collectives"

_ATTENTION_KEY = {
    "dtype": TEXT,
    "kv_dtype": TEXT,
    "heads": COUNT,
    "kv_heads": COUNT,
    "head_dim": COUNT,
    "window": COUNT,
}
_MLA_KEY = {
    "form": TEXT,  # "absorbed" (multi-query over the latent) or "expanded" (multi-head over the projected KV)
    "dtype": TEXT,
    "kv_dtype": TEXT,
    "heads": COUNT,
    "kv_lora_rank": COUNT,
    "qk_nope_head_dim": COUNT,
    "qk_rope_head_dim": COUNT,
    "value_head_dim": COUNT,
}

# A whole attention block as an engine runs it, projections included; `heads` of one rank of `tp`.
_MODULE_KEY = {
    "module": TEXT,  # mla, wideep_mla, dsa, dsa_skip_indexer, msa, dsv4_csa, dsv4_hca
    "model": TEXT,
    "dtype": TEXT,
    "kv_dtype": TEXT,
    "gemm_dtype": TEXT,  # of the projections
    "heads": COUNT,
    "tp": COUNT,
    "compress_ratio": COUNT,  # KV tokens to one compressed entry; 0 where nothing is compressed
}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        # [m, k] x [k, n].
        Family("gemm", {"dtype": TEXT, "n": COUNT, "k": COUNT}, ("m",), "gemm", KERNELS),
        # One rank's experts: `routed` (token, expert) pairs spread by `distribution` over `local_experts`.
        # For power-law rows `routed` is the mean over ranks; the row was measured on the fullest rank.
        Family(
            "experts",
            {
                "grouping": TEXT,
                "dtype": TEXT,
                "hidden": COUNT,
                "intermediate": COUNT,
                "experts": COUNT,
                "top_k": COUNT,
                "local_experts": COUNT,
                "distribution": TEXT,
            },
            ("routed",),
            "experts",
            KERNELS,
        ),
        Family("attention_prefill", _ATTENTION_KEY, ("batch", "new_tokens"), "attention", KERNELS),
        Family("attention_decode", _ATTENTION_KEY, ("batch", "kv_tokens"), "attention", KERNELS),
        Family("mla_prefill", _MLA_KEY, ("batch", "new_tokens"), "attention", KERNELS),
        Family("mla_decode", _MLA_KEY, ("batch", "kv_tokens"), "attention", KERNELS),
        Family(
            "mla_absorb",
            {"side": TEXT, "dtype": TEXT, "heads": COUNT, "kv_lora_rank": COUNT, "head_dim": COUNT},
            ("tokens",),
            "gemm",
            KERNELS,
        ),
        # `bytes` as nccl-tests counts a size.
        Family(
            "collective",
            {"kind": TEXT, "path": TEXT, "gpus": COUNT, "nodes": COUNT},
            ("bytes",),
            "collective",
            COLLECTIVES,
        ),
        # An all-to-all with uneven splits, by what makes its time: what the busiest rank sends or receives (the larger)
        # and its other direction, the most that a rank exchanges with other nodes in one direction, and the most that
        # stays on a rank. `bytes`: the send buffer of a rank, the mean over ranks.
        Family(
            "uneven_all_to_all",
            {
                "path": TEXT,
                "gpus": COUNT,
                "nodes": COUNT,
                "busiest_bytes": COUNT,
                "other_way_bytes": COUNT,
                "off_node_bytes": COUNT,
                "kept_bytes": COUNT,
            },
            ("bytes",),
            measured_by=COLLECTIVES,
        ),
        # A transfer while something else runs on the same ranks: never the price of a transfer alone. `slowdown` of the
        # transfer and `beside_slowdown` of the other work are its time beside over its time alone.
        Family(
            "overlap",
            {"work": TEXT, "beside": TEXT, "path": TEXT, "gpus": COUNT, "nodes": COUNT},
            ("bytes",),
            measured_by=COLLECTIVES,
            values=("slowdown", "beside_slowdown"),
        ),
        # DeepEP; `tokens` of each rank.
        Family(
            "exchange",
            {
                "step": TEXT,
                "mode": TEXT,
                "nodes": COUNT,
                "ep": COUNT,
                "hidden": COUNT,
                "top_k": COUNT,
                "experts": COUNT,
                "dtype": TEXT,
                "sms": COUNT,
            },
            ("tokens",),
            "dispatch",
            COLLECTIVES,
        ),
        # From here on nothing is priced yet: docs/explanation/costs.md says of each what was measured and why not.
        # Collectives that no lookup takes: another element type, or launched eagerly.
        Family(
            "collective_variant",
            {"kind": TEXT, "path": TEXT, "dtype": TEXT, "launch": TEXT, "gpus": COUNT, "nodes": COUNT},
            ("bytes",),
        ),
        # All-to-alls of experts but SGLang's DeepEP; `tokens` of each rank, `dispatch_dtype` of what a run sends.
        Family(
            "all_to_all",
            {
                "step": TEXT,
                "backend": TEXT,
                "nodes": COUNT,
                "ep": COUNT,
                "hidden": COUNT,
                "top_k": COUNT,
                "experts": COUNT,
                "dispatch_dtype": TEXT,
                "routing": TEXT,
                "sms": COUNT,
            },
            ("tokens",),
        ),
        Family("encoder_attention", {"dtype": TEXT, "heads": COUNT, "head_dim": COUNT}, ("batch", "new_tokens")),
        Family("attention_module_prefill", {**_MODULE_KEY, "prefix_tokens": COUNT}, ("batch", "new_tokens")),
        Family("attention_module_decode", _MODULE_KEY, ("batch", "kv_tokens")),
        # One kernel inside a sparse attention block; prefill and decode alike.
        Family(
            "attention_part",
            {
                "part": TEXT,
                "scores": TEXT,  # the scores that a top-k was run on; empty elsewhere
                "model": TEXT,
                "dtype": TEXT,
                "kv_dtype": TEXT,
                "heads": COUNT,
                "tp": COUNT,
                "compress_ratio": COUNT,
                "prefix_tokens": COUNT,
            },
            ("batch", "new_tokens"),
        ),
        # Convolution and recurrence kernels of gated delta networks (gdn) and Kimi delta attention (kda).
        Family(
            "linear_attention",
            {
                "op": TEXT,
                "phase": TEXT,
                "model": TEXT,
                "hidden": COUNT,
                "conv": COUNT,
                "key_heads": COUNT,
                "key_head_dim": COUNT,
                "value_heads": COUNT,
                "value_head_dim": COUNT,
            },
            ("batch", "new_tokens"),
        ),
        # The convolution of a Mamba-2 layer.
        Family(
            "state_space",
            {
                "phase": TEXT,
                "model": TEXT,
                "hidden": COUNT,
                "state": COUNT,
                "conv": COUNT,
                "heads": COUNT,
                "head_dim": COUNT,
                "groups": COUNT,
                "chunk": COUNT,
            },
            ("batch", "new_tokens"),
        ),
        # Dispatch, experts and combine as one kernel over all ranks; `capacity` tokens of a rank fit its buffer.
        Family(
            "moe_module",
            {
                "phase": TEXT,
                "dtype": TEXT,
                "hidden": COUNT,
                "intermediate": COUNT,
                "experts": COUNT,
                "top_k": COUNT,
                "ep": COUNT,
                "distribution": TEXT,
                "capacity": COUNT,
            },
            ("tokens",),
        ),
        # A dense SwiGLU with its three products' quantisation.
        Family("mlp", {"phase": TEXT, "dtype": TEXT, "hidden": COUNT, "intermediate": COUNT}, ("tokens",)),
        # Quantising activations [tokens, k].
        Family("quantize", {"op": TEXT, "dtype": TEXT, "k": COUNT}, ("tokens",)),
        # DeepSeek-V4's hyper-connections, all `sites` of a layer.
        Family(
            "hyper_connection",
            {"op": TEXT, "hidden": COUNT, "mult": COUNT, "sites": COUNT, "iterations": COUNT},
            ("tokens",),
        ),
    )
}
