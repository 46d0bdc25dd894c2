"""Costs by formula: the time of a small call, and the larger of compute and memory time at shares of the datasheet.

It needs no measurement of the GPU. What kernels reach of a datasheet is fitted to tables of other GPUs
(`moesim.cost.reach`), and `rel_sigma` says how far that is off on GPUs that the fit did not see. The measured store
(package `profiles`) uses the same formulas where a scenario allows it to go on beyond what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import CostModel, Estimate, Tag, estimate
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
from moesim.cost.reach import Reach, reach
from moesim.spec.cluster import ClusterSpec, LinkFigure
from moesim.spec.model import ModelSpec
from moesim.spec.scenario import Scenario
from moesim.units import BYTES_PER_ELEMENT

# STREAM triad on H200 SXM in stas00/ml-engineering, compute/accelerator: 4.15 of 4.8 TB/s. Of what only moves bytes.
HBM_FRACTION = 4.15 / 4.8
# NVLink: all-to-all reaches about 370 of 450 GB/s per GPU and direction on H100 (NVIDIA/nccl-tests issue 212).
NVLINK_FRACTION = 370.0 / 450.0
# A NIC: DeepEP's README reports 43 to 47 GB/s of the 50 GB/s of ConnectX-7 in normal mode, EP16 to EP64.
NIC_FRACTION = 0.9
# What exchanges reach of a datasheet's link rates.
REACHED: dict[LinkFigure, float] = {
    "nvlink_bytes_per_s": NVLINK_FRACTION,
    "pcie_bytes_per_s": NVLINK_FRACTION,
    "nic_bytes_per_s": NIC_FRACTION,
}
# A kernel that does nothing takes this long inside a captured graph: `mem_empirical_constant_latency` in
# aiconfigurator-core 0.12.0, systems/h200_sxm.yaml (a correction by its authors, "from observations").
LAUNCH_S = 3e-6
# Kernels of grouped products that no table has: two products and an activation, as one plain product each.
EXPERT_CALLS = 3
# Assumed, not measured: how far a formula is off for what `reach` has no measurement of (one standard deviation of ln).
REL_SIGMA = 0.35

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
class Roofline:
    """The roofline cost model of a cluster; implements CostModel."""

    cluster: ClusterSpec

    def estimate(self, operation: Operation) -> Estimate:
        """Price one operation by formula; never refuses."""
        work = self.work(operation)
        return estimate(
            self.seconds(operation) if work is None else work.seconds(),
            Tag.FORMULA,
            family_of(operation),
            REL_SIGMA if work is None else work.rel_sigma,
            f"roofline of {self.cluster.gpu.name}",
        )

    def seconds(self, operation: Operation) -> Seconds:
        """Seconds of the operation, in the broadcast shape of its sizes."""
        match operation:
            case MemoryBound():
                return self.memory_bound(operation.bytes)
            case Collective():
                return self.collective(operation)
            case MoeExchange():
                return self.exchange(operation)
            case _:
                work = self.work(operation)
                assert work is not None
                return work.seconds()

    def work(self, operation: Operation) -> Work | None:
        """What a kernel has to compute and to move; None of what `reach` has no figures of."""
        match operation:
            case Gemm():
                return self.gemm(operation)
            case ExpertGemm():
                return self.experts(operation)
            case Attention() | MlaAttention():
                return self.attention(operation)
            case MlaAbsorb():
                return self.absorb(operation)
            case _:
                return None

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

    def collective(self, op: Collective) -> Seconds:
        """Latency and bandwidth terms of ring algorithms; between NVLink domains the NIC is the bottleneck.

        Bus factors as in NVIDIA/nccl-tests doc/PERFORMANCE.md: all-reduce 2(n-1)/n, the others (n-1)/n.
        """
        size = np.asarray(op.bytes, dtype=np.float64)
        share = (op.gpus - 1) / op.gpus
        steps = 2.0 if op.kind == "all_reduce" else 1.0
        nvlink = self._near_bytes_per_s()
        nic = self._nic_bytes_per_s()
        latency = steps * self.cluster.near_latency_s * np.log2(max(op.gpus, 2))
        domains = self._domains(op)
        if domains == 1:
            busy = steps * share * size / nvlink
        else:
            latency += steps * self.cluster.nic_latency_s * np.log2(domains)
            remote = (domains - 1) / domains
            if op.kind == "all_to_all":  # every byte for another domain leaves through the rank's own NIC
                busy = np.maximum(share * size / nvlink, remote * size / nic)
            else:  # rings through the domains: each GPU's NIC carries its share of the domain's buffer
                per_gpu = size / max(op.gpus // domains, 1)
                busy = np.maximum(steps * share * size / nvlink, steps * remote * per_gpu / nic)
        return np.where((size > 0) & (op.gpus > 1), busy + latency + LAUNCH_S, 0.0)

    def _domains(self, op: Collective | MoeExchange) -> int:
        """NVLink domains that its ranks lie in; within one of them no byte leaves by a NIC."""
        return op.domains or self.cluster.domains_of(op.nodes)

    def _near_bytes_per_s(self) -> float:
        """What a GPU reaches inside its domain: the measured rate, or a share of the datasheet's."""
        name = "nvlink_bytes_per_s" if self.cluster.nvlink_bytes_per_s else "pcie_bytes_per_s"
        return self.cluster.near_bytes_per_s * (1.0 if name in self.cluster.measured else NVLINK_FRACTION)

    def _nic_bytes_per_s(self) -> float:
        """What a GPU reaches between nodes: the measured rate, or a share of the datasheet's."""
        return self.cluster.shared_nic_bytes_per_s * (
            1.0 if "nic_bytes_per_s" in self.cluster.measured else NIC_FRACTION
        )

    def exchange(self, op: MoeExchange) -> Seconds:
        """DeepEP by bytes: low-latency sends a copy for each selected expert, normal one to each destination domain.

        Source: README of deepseek-ai/DeepEP (low-latency over RDMA by expert; normal forwards from NIC to NVLink).
        """
        tokens = np.asarray(op.tokens, dtype=np.float64)
        row = op.hidden * _bytes(op.dtype)
        domains = self._domains(op)
        remote = (domains - 1) / domains
        nic = self._nic_bytes_per_s()
        nvlink = self._near_bytes_per_s()
        latency = 2 * LAUNCH_S + self.cluster.near_latency_s
        if domains > 1:
            latency += 2 * self.cluster.nic_latency_s
        if op.mode == "low_latency":
            copies = float(op.top_k)
            each: float = max(copies * remote / nic, copies * (1.0 - remote) / nvlink)
            return np.asarray(tokens * row * each + latency, dtype=np.float64)
        by_domain = domains * (1.0 - (1.0 - 1.0 / domains) ** op.top_k) * remote
        by_rank = op.ep * (1.0 - (1.0 - 1.0 / op.ep) ** op.top_k)
        busy = tokens * row * max(by_domain / nic, by_rank / nvlink)
        return np.where(tokens > 0, busy + latency, 0.0)


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
