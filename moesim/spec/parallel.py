"""The parallelism plan: how the ranks of one model instance share its work."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moesim.spec.base import Spec

Axis = Literal["tp", "cp", "dp", "pp"]


class ParallelSpec(Spec):
    """Degrees of parallelism of one instance; `ep x expert_tp` spans the same GPUs as `tp x cp x attention_dp`."""

    tp: int = Field(default=1, gt=0, description="tensor parallelism of attention and dense layers")
    pp: int = Field(default=1, gt=0)
    cp: int = Field(default=1, gt=0)
    attention_dp: int = Field(default=1, gt=0, description="data-parallel attention ranks in lockstep")
    ep: int = Field(default=1, gt=0, description="expert parallelism")
    expert_tp: int = Field(default=1, gt=0, description="tensor parallelism inside an expert")
    # Left out where it splits nothing: plans are written as before there was the key, and recorded ones stay equal.
    decode_cp: int = Field(
        default=1,
        gt=0,
        exclude_if=lambda parts: parts == 1,
        description="serving: GPUs of a TP group that split a context's KV cache by its tokens; takes no GPUs more",
    )
    rank_order: tuple[Axis, ...] = Field(default=("tp", "cp", "dp", "pp"), description="fastest-varying axis first")

    @model_validator(mode="after")
    def _spans_agree(self) -> ParallelSpec:
        stage = self.tp * self.cp * self.attention_dp
        if self.ep * self.expert_tp != stage:
            raise ValueError(
                f"ep {self.ep} x expert_tp {self.expert_tp} = {self.ep * self.expert_tp} must equal "
                f"tp {self.tp} x cp {self.cp} x attention_dp {self.attention_dp} = {stage}; set all of them that are "
                f"not 1, e.g. ep: {stage}"
            )
        if sorted(self.rank_order) != ["cp", "dp", "pp", "tp"]:
            raise ValueError("rank_order must name tp, cp, dp and pp once each")
        if self.tp % self.decode_cp:
            raise ValueError(
                f"decode_cp {self.decode_cp} splits the cache among the GPUs of a TP group, and tp {self.tp} does not "
                "divide by it"
            )
        return self

    @property
    def gpus(self) -> int:
        """GPUs of one instance."""
        return self.tp * self.cp * self.attention_dp * self.pp

    def label(self) -> str:
        """Short name for tables: `TP2 DP16 EP32`."""
        parts = [
            ("TP", self.tp),
            ("PP", self.pp),
            ("CP", self.cp),
            ("DCP", self.decode_cp),
            ("DP", self.attention_dp),
            ("EP", self.ep),
            ("ETP", self.expert_tp),
        ]
        return " ".join(f"{name}{size}" for name, size in parts if size > 1) or "1 GPU"
