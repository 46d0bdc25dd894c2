"""What a cluster is: GPUs, the links inside a node and between nodes."""

from __future__ import annotations

from pydantic import Field

from moesim.spec.base import Spec


class GpuSpec(Spec):
    """One GPU: peaks from its datasheet, never measured fractions."""

    name: str
    hbm_bytes: float = Field(gt=0)
    hbm_bytes_per_s: float = Field(gt=0)
    flops_per_s: dict[str, float] = Field(description="dense peak by element type: bf16, fp8, fp4")
    multiprocessors: int = Field(gt=0)

    def peak(self, dtype: str) -> float:
        """Dense peak FLOP/s of the units that compute `dtype`; weight-only types compute in bf16."""
        family = {"fp8_block": "fp8", "fp8": "fp8", "nvfp4": "fp4", "int8": "fp8"}.get(dtype, "bf16")
        return self.flops_per_s.get(family, self.flops_per_s["bf16"])


class ClusterSpec(Spec):
    """A homogeneous cluster. Link rates are for one GPU and one direction."""

    name: str
    gpu: GpuSpec
    nodes: int = Field(default=1, gt=0)
    gpus_per_node: int = Field(default=8, gt=0)
    nvlink_bytes_per_s: float = Field(gt=0)
    nic_bytes_per_s: float = Field(gt=0, description="network rate that one GPU can use between nodes")
    pcie_bytes_per_s: float = Field(gt=0)
    nvlink_latency_s: float = Field(default=2e-6, ge=0)
    nic_latency_s: float = Field(default=5e-6, ge=0)
    nvlink_domain_gpus: int = Field(default=0, ge=0, description="GPUs that share NVLink; 0 = one node")
    sources: dict[str, str] = Field(default_factory=dict, description="field -> where the figure comes from")

    @property
    def gpus(self) -> int:
        """All GPUs of the cluster."""
        return self.nodes * self.gpus_per_node

    @property
    def domain_gpus(self) -> int:
        """GPUs that reach each other over NVLink without a NIC."""
        return self.nvlink_domain_gpus or self.gpus_per_node
