"""Costs by formula: the larger of compute and memory time at documented fractions of the datasheet's peaks.

It needs no measurement and is unsure by a wide margin, which `rel_sigma` says. The measured store (package `profiles`)
uses the same formulas where a scenario allows it to go on beyond what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from moesim.spec.cluster import ClusterSpec, LinkFigure
from moesim.spec.model import ModelSpec
from moesim.spec.scenario import Scenario
from moesim.units import BYTES_PER_ELEMENT

# Fractions of the datasheet's peak that the best measured kernels reach: "maximum achievable matmul" and STREAM triad
# on H200 SXM in stas00/ml-engineering, compute/accelerator: fp8 1453.4 of 1979 TFLOP/s; triad 4.15 of 4.8 TB/s; bf16
# the H100 SXM figure, 794.5 of 989 TFLOP/s (same multiprocessors; H200's is not listed there).
COMPUTE_FRACTION = {"fp8": 1453.4 / 1979.0, "bf16": 794.5 / 989.0}
HBM_FRACTION = 4.15 / 4.8
# Attention reaches less than a plain matrix product: FlashAttention-3 (arXiv:2407.08608, figure 5) reports up to
# 740 of 989 TFLOP/s in bf16 on H100, forward, head size 128, causal below that.
ATTENTION_FRACTION = 0.6
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
# Launches of one operation: the grouped SwiGLU runs two products and an activation.
EXPERT_LAUNCHES = 3
# Assumed, not measured: how far a roofline is off for kernels in general (one standard deviation of ln).
REL_SIGMA = 0.35

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Roofline:
    """The roofline cost model of a cluster; implements CostModel."""

    cluster: ClusterSpec

    def estimate(self, operation: Operation) -> Estimate:
        """Price one operation by formula; never refuses."""
        return estimate(
            self.seconds(operation),
            Tag.FORMULA,
            family_of(operation),
            REL_SIGMA,
            f"roofline of {self.cluster.gpu.name}",
        )

    def seconds(self, operation: Operation) -> Seconds:
        """Seconds of the operation, in the broadcast shape of its sizes."""
        match operation:
            case Gemm():
                return self.gemm(operation)
            case ExpertGemm():
                return self.experts(operation)
            case Attention() | MlaAttention():
                return self.attention(operation)
            case MlaAbsorb():
                return self.absorb(operation)
            case MemoryBound():
                return self.memory_bound(operation.bytes)
            case Collective():
                return self.collective(operation)
            case MoeExchange():
                return self.exchange(operation)

    def compute_s(self, flops: Floats, dtype: str) -> Seconds:
        """Seconds of `flops` on the units that compute `dtype`."""
        fraction = COMPUTE_FRACTION["fp8" if self.cluster.gpu.peak(dtype) > self.cluster.gpu.peak("bf16") else "bf16"]
        return np.asarray(flops, dtype=np.float64) / (fraction * self.cluster.gpu.peak(dtype))

    def hbm_s(self, moved: Floats) -> Seconds:
        """Seconds to move bytes over HBM."""
        return np.asarray(moved, dtype=np.float64) / (HBM_FRACTION * self.cluster.gpu.hbm_bytes_per_s)

    def memory_bound(self, moved: Floats) -> Seconds:
        """bytes / (fraction x peak) and one launch; 0 bytes cost 0."""
        size = np.asarray(moved, dtype=np.float64)
        return np.where(size > 0, self.hbm_s(size) + LAUNCH_S, 0.0)

    def gemm(self, op: Gemm) -> Seconds:
        """2 m n k FLOP against weights, input and output through HBM."""
        m = np.asarray(op.m, dtype=np.float64)
        weights = op.n * op.k * _bytes(op.dtype)
        moved = weights + m * (op.k * _activation_bytes(op.dtype) + op.n * 2.0)
        busy = np.maximum(self.compute_s(2.0 * m * op.n * op.k, op.dtype), self.hbm_s(moved))
        return np.where(m > 0, busy + LAUNCH_S, 0.0)

    def experts(self, op: ExpertGemm) -> Seconds:
        """All tokens' FLOP against the weights of the touched experts and the activations."""
        tokens = np.asarray(op.tokens, dtype=np.float64)
        total = tokens.sum(axis=-1)
        weights = 3.0 * op.hidden * op.intermediate * _bytes(op.dtype)
        touched = np.minimum(tokens, 1.0).sum(axis=-1)
        moved = touched * weights + total * activation_bytes_per_pair(op.hidden, op.intermediate, op.dtype)
        flops = 6.0 * total * op.hidden * op.intermediate
        busy = np.maximum(self.compute_s(flops, op.dtype), self.hbm_s(moved))
        return np.where(total > 0, busy + EXPERT_LAUNCHES * LAUNCH_S, 0.0)

    def attention(self, op: Attention | MlaAttention) -> Seconds:
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
        else:
            widths = 2 * op.head_dim
            cached = 2 * op.kv_heads * op.head_dim
            window = op.window
        pairs = new * (prefix + 0.5 * (new + 1.0))
        length = prefix + new
        if window:
            pairs = np.minimum(pairs, new * float(window))
            length = np.minimum(length, window + new)
        flops = 2.0 * batch * op.heads * widths * pairs
        moved = batch * (length * cached * _bytes(op.kv_dtype) + new * op.heads * widths * 2.0)
        peak = ATTENTION_FRACTION * self.cluster.gpu.peak(op.dtype)
        busy = np.maximum(flops / peak, self.hbm_s(moved))
        return np.where((batch > 0) & (new > 0), busy + LAUNCH_S, 0.0)

    def absorb(self, op: MlaAbsorb) -> Seconds:
        """A batched product over the heads between head and latent space."""
        tokens = np.asarray(op.tokens, dtype=np.float64)
        weights = op.heads * op.kv_lora_rank * op.head_dim
        moved = weights * _bytes(op.dtype) + tokens * op.heads * (op.kv_lora_rank + op.head_dim) * 2.0
        busy = np.maximum(self.compute_s(2.0 * tokens * weights, op.dtype), self.hbm_s(moved))
        return np.where(tokens > 0, busy + LAUNCH_S, 0.0)

    def collective(self, op: Collective) -> Seconds:
        """Latency and bandwidth terms of ring algorithms; across nodes the NIC is the bottleneck.

        Bus factors as in NVIDIA/nccl-tests doc/PERFORMANCE.md: all-reduce 2(n-1)/n, the others (n-1)/n.
        """
        size = np.asarray(op.bytes, dtype=np.float64)
        share = (op.gpus - 1) / op.gpus
        steps = 2.0 if op.kind == "all_reduce" else 1.0
        nvlink = self._near_bytes_per_s()
        nic = self._nic_bytes_per_s()
        latency = steps * self.cluster.near_latency_s * np.log2(max(op.gpus, 2))
        if op.nodes == 1:
            busy = steps * share * size / nvlink
        else:
            latency += steps * self.cluster.nic_latency_s * np.log2(op.nodes)
            remote = (op.nodes - 1) / op.nodes
            if op.kind == "all_to_all":  # every byte for another node leaves through the rank's own NIC
                busy = np.maximum(share * size / nvlink, remote * size / nic)
            else:  # rings through the nodes: each GPU's NIC carries its share of the node's buffer
                per_gpu = size / max(op.gpus // op.nodes, 1)
                busy = np.maximum(steps * share * size / nvlink, steps * remote * per_gpu / nic)
        return np.where((size > 0) & (op.gpus > 1), busy + latency + LAUNCH_S, 0.0)

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
        """DeepEP by bytes: low-latency sends a copy for each selected expert, normal one to each destination node.

        Source: README of deepseek-ai/DeepEP (low-latency over RDMA by expert; normal forwards from NIC to NVLink).
        """
        tokens = np.asarray(op.tokens, dtype=np.float64)
        row = op.hidden * _bytes(op.dtype)
        remote = (op.nodes - 1) / op.nodes
        nic = self._nic_bytes_per_s()
        nvlink = self._near_bytes_per_s()
        latency = 2 * LAUNCH_S + self.cluster.near_latency_s
        if op.nodes > 1:
            latency += 2 * self.cluster.nic_latency_s
        if op.mode == "low_latency":
            copies = float(op.top_k)
            each: float = max(copies * remote / nic, copies * (1.0 - remote) / nvlink)
            return np.asarray(tokens * row * each + latency, dtype=np.float64)
        by_node = op.nodes * (1.0 - (1.0 - 1.0 / op.nodes) ** op.top_k) * remote
        by_rank = op.ep * (1.0 - (1.0 - 1.0 / op.ep) ** op.top_k)
        busy = tokens * row * max(by_node / nic, by_rank / nvlink)
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
