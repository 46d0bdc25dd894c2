"""Costs by formula: the time of a small call, and the larger of compute and memory time at shares of the datasheet.

It needs no measurement of the GPU. What kernels reach of a datasheet is fitted to tables of other GPUs
(`moesim.cost.reach`), and `rel_sigma` says how far that is off on GPUs that the fit did not see. The measured store
(package `profiles`) uses the same formulas where a scenario allows it to go on beyond what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.cost import links
from moesim.cost.estimate import CostModel, Estimate, Tag, estimate
from moesim.cost.links import LAUNCH_S, Transfer
from moesim.cost.ops import (
    Attention,
    Collective,
    ExpertGemm,
    Floats,
    Gemm,
    MemoryBound,
    MlaAbsorb,
    MlaAttention,
    MoeExchange,
    Operation,
)
from moesim.cost.reach import REL_SIGMA, Reach, reach
from moesim.spec.cluster import ClusterSpec
from moesim.spec.model import ModelSpec
from moesim.spec.scenario import Scenario
from moesim.units import BYTES_PER_ELEMENT

# STREAM triad on H200 SXM in stas00/ml-engineering, compute/accelerator: 4.15 of 4.8 TB/s. Of what only moves bytes.
HBM_FRACTION = 4.15 / 4.8
# Kernels of grouped products that no table has: two products and an activation, as one plain product each.
EXPERT_CALLS = 3

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Work:
    """What a kernel has to do. kind, dtype: as `reach` names them. compute_s, hbm_s: at the datasheet's peaks.

    calls: kernels that share the work, each with its own time of a small call. stands_in: whether the figures are of
    another kind of kernel, as this one is in no table.
    """

    kind: str
    dtype: str
    compute_s: Seconds
    hbm_s: Seconds
    calls: int = 1
    stands_in: bool = False

    @property
    def reach(self) -> Reach:
        """The figures of its kind of kernel."""
        return reach(self.kind, self.dtype)

    @property
    def rel_sigma(self) -> float:
        """One standard deviation of ln(true / predicted)."""
        other = self.stands_in or self.reach.dtype != self.dtype
        return max(self.reach.rel_sigma, REL_SIGMA) if other else self.reach.rel_sigma

    def seconds(self) -> Seconds:
        """A small call's time and the larger of compute and memory time; no work takes no time."""
        reached = self.reach
        busy = np.maximum(self.compute_s / reached.compute, self.hbm_s / reached.hbm)
        return np.where(busy > 0, busy + self.calls * reached.floor_s, 0.0)


@dataclass(frozen=True)
class Moved:
    """Bytes of a kernel that only moves them, in seconds; `reach` has no figures of it."""

    needed_s: Seconds
    rel_sigma: float = REL_SIGMA

    def seconds(self) -> Seconds:
        """As they are."""
        return self.needed_s


@dataclass(frozen=True)
class Roofline:
    """The roofline cost model of a cluster; implements CostModel."""

    cluster: ClusterSpec

    def estimate(self, operation: Operation) -> Estimate:
        """Price one operation by formula; never refuses."""
        work = self.work(operation)
        return estimate(
            work.seconds(),
            Tag.FORMULA,
            family_of(operation),
            work.rel_sigma,
            f"roofline of {self.cluster.gpu.name}",
        )

    def seconds(self, operation: Operation) -> Seconds:
        """Seconds of the operation, in the broadcast shape of its sizes."""
        return self.work(operation).seconds()

    def work(self, operation: Operation) -> Work | Transfer | Moved:
        """What a kernel has to compute and to move, or what travels over links."""
        match operation:
            case Gemm():
                return self.gemm(operation)
            case ExpertGemm():
                return self.experts(operation)
            case Attention() | MlaAttention():
                return self.attention(operation)
            case MlaAbsorb():
                return self.absorb(operation)
            case Collective():
                return links.collective(self.cluster, operation)
            case MoeExchange():
                return links.exchange(self.cluster, operation)
            case MemoryBound():
                return Moved(self.memory_bound(operation.bytes))

    def _work(self, kind: str, dtype: str, flops: Floats, moved: Floats) -> Work:
        """flops and moved: of the operation, both 0 where it has nothing to do."""
        peak = self.cluster.gpu.peak(dtype.split("/", maxsplit=1)[0])
        some = np.asarray(flops, dtype=np.float64) > 0
        return Work(kind, dtype, flops / peak, np.where(some, moved / self.cluster.gpu.hbm_bytes_per_s, 0.0))

    def memory_bound(self, moved: Floats) -> Seconds:
        """bytes / (fraction x peak) and one launch; 0 bytes cost 0."""
        size = np.asarray(moved, dtype=np.float64)
        return np.where(size > 0, size / (HBM_FRACTION * self.cluster.gpu.hbm_bytes_per_s) + LAUNCH_S, 0.0)

    def gemm(self, op: Gemm) -> Work:
        """2 m n k FLOP against weights, input and output through HBM."""
        m = np.asarray(op.m, dtype=np.float64)
        weights = op.n * op.k * _bytes(op.dtype)
        moved = weights + m * (op.k * _activation_bytes(op.dtype) + op.n * 2.0)
        return self._work("gemm", op.dtype, 2.0 * m * op.n * op.k, moved)

    def experts(self, op: ExpertGemm) -> Work:
        """All tokens' FLOP against the weights of the touched experts and the activations."""
        tokens = np.asarray(op.tokens, dtype=np.float64)
        total = tokens.sum(axis=-1)
        weights = 3.0 * op.hidden * op.intermediate * _bytes(op.dtype)
        touched = np.minimum(tokens, 1.0).sum(axis=-1)
        moved = touched * weights + total * activation_bytes_per_pair(op.hidden, op.intermediate, op.dtype)
        flops = 6.0 * total * op.hidden * op.intermediate
        if op.grouping == "grouped":
            return replace(self._work("gemm", op.dtype, flops, moved), calls=EXPERT_CALLS, stands_in=True)
        return self._work(f"experts {op.grouping}", op.dtype, flops, moved)

    def attention(self, op: Attention | MlaAttention) -> Work:
        """Scores and values over the causal pairs of query and key, against reading the KV cache once."""
        batch, new, prefix = np.broadcast_arrays(
            np.asarray(op.batch, dtype=np.float64),
            np.asarray(op.new_tokens, dtype=np.float64),
            np.asarray(op.prefix_tokens, dtype=np.float64),
        )
        if isinstance(op, MlaAttention):
            latent = op.kv_lora_rank + op.qk_rope_head_dim
            expanded = op.qk_nope_head_dim + op.qk_rope_head_dim
            decode = op.phase == "decode"
            widths = latent + op.kv_lora_rank if decode else expanded + op.value_head_dim
            cached = latent if decode else op.heads * (expanded + op.value_head_dim)
            window = 0
            kind = f"mla {op.phase}"
        else:
            widths = 2 * op.head_dim
            cached = 2 * op.kv_heads * op.head_dim
            window = op.window
            kind = f"attention {op.phase}{' window' if window else ''}"
        pairs = new * (prefix + 0.5 * (new + 1.0))
        length = prefix + new
        if window:
            pairs = np.minimum(pairs, new * float(window))
            length = np.minimum(length, window + new)
        flops = 2.0 * batch * op.heads * widths * pairs
        moved = batch * (length * cached * _bytes(op.kv_dtype) + new * op.heads * widths * 2.0)
        return self._work(kind, f"{op.dtype}/{op.kv_dtype}", flops, moved)

    def absorb(self, op: MlaAbsorb) -> Work:
        """A batched product over the heads between head and latent space."""
        tokens = np.asarray(op.tokens, dtype=np.float64)
        weights = op.heads * op.kv_lora_rank * op.head_dim
        moved = weights * _bytes(op.dtype) + tokens * op.heads * (op.kv_lora_rank + op.head_dim) * 2.0
        return self._work("mla absorb", op.dtype, 2.0 * tokens * weights, moved)


def activation_bytes_per_pair(hidden: int, intermediate: int, dtype: str) -> float:
    """Bytes that one (token, expert) pair moves through HBM: input, gate and up, their product, output."""
    narrow = _activation_bytes(dtype)
    return hidden * narrow + 2 * intermediate * 2.0 + 2 * intermediate * narrow + hidden * 2.0


def family_of(operation: Operation) -> str:
    """The shared cost parameter that the operation's error belongs to."""
    match operation:
        case Gemm() | MlaAbsorb():
            return "gemm"
        case ExpertGemm():
            return "experts"
        case Attention() | MlaAttention():
            return "attention"
        case MemoryBound():
            return "memory_bound"
        case Collective():
            return "collective"
        case MoeExchange():
            return "dispatch"


def from_scenario(scenario: Scenario, model: ModelSpec, cluster: ClusterSpec) -> CostModel:
    """The roofline cost model of the scenario's cluster."""
    return Roofline(cluster)


def _bytes(dtype: str) -> float:
    return BYTES_PER_ELEMENT[dtype]


def _activation_bytes(dtype: str) -> float:
    """Bytes of an activation element that meets weights of `dtype`: weight-only types keep bf16."""
    return BYTES_PER_ELEMENT[dtype] if dtype in ("fp8", "fp8_block", "int8", "nvfp4", "fp32") else 2.0
