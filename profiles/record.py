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
    """One family of rows: its file is `<name>.parquet`."""

    name: str
    key: dict[str, str]
    point: tuple[str, ...]
    cost_family: str
    measured_by: str

    @property
    def columns(self) -> dict[str, str]:
        """All columns in order -> TEXT, COUNT or NUMBER."""
        sizes = dict.fromkeys(self.point, NUMBER)
        return {**self.key, **sizes, LATENCY: NUMBER, **PROVENANCE}


# Rows that were measured by this package; they price for every engine whose scenario names their profile.
MEASURED_ENGINE = "moesim"
# Rows that DeepEP's own tests printed; they price the exchanges of every engine that runs DeepEP.
DEEPEP = "deepep"
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
    )
}
