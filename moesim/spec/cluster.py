"""What a cluster is: GPUs, the links inside a node and between nodes."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from moesim.spec.base import Spec

# The figures of links that can be measured.
LinkFigure = Literal[
    "nvlink_bytes_per_s", "nvlink_latency_s", "nic_bytes_per_s", "nic_latency_s", "pcie_bytes_per_s", "pcie_latency_s"
]

# Element type -> whose peak counts; all others compute in bf16.
PEAK_OF = {
    "fp8_block": "fp8", "fp8": "fp8", "int8": "fp8", "w4a8_mxfp4_mxfp8": "fp8", "nvfp4": "fp4", "fp32": "fp32",
}  # fmt: skip


class GpuSpec(Spec):
    """One GPU: peaks from its datasheet, never measured fractions."""

    name: str
    hbm_bytes: float = Field(gt=0)
    hbm_bytes_per_s: float = Field(gt=0)
    flops_per_s: dict[str, float] = Field(description="dense peak by element type: bf16, fp8, fp4, fp32")
    multiprocessors: int = Field(gt=0)

    def peak(self, dtype: str) -> float:
        """Dense peak FLOP/s of the units that compute `dtype`; weight-only types compute in bf16."""
        return self.flops_per_s.get(PEAK_OF.get(dtype, "bf16"), self.flops_per_s["bf16"])


class NodeLayout(Spec):
    """Which NIC each GPU of a node uses, and on which PCIe switches and CPU sockets they hang; every node alike.

    Numbers count from 0 within the node. `nvidia-smi topo -m` shows all of it: PIX and PXB are one switch, PHB and NODE
    one socket, SYS two. An empty list is the default: GPU i uses NIC i, beside it on a switch of their own.
    """

    gpu_nic: tuple[int, ...] = Field(default=(), description="NIC that each GPU uses")
    gpu_switch: tuple[int, ...] = Field(default=(), description="PCIe switch that each GPU hangs on")
    nic_switch: tuple[int, ...] = Field(default=(), description="PCIe switch that each NIC hangs on")
    switch_socket: tuple[int, ...] = Field(default=(), description="CPU socket (host bridge) of each PCIe switch")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if any(number < 0 for name in type(self).model_fields for number in getattr(self, name)):
            raise ValueError("numbers of NICs, switches and sockets count from 0")
        if bool(self.gpu_switch) != bool(self.nic_switch):
            raise ValueError("gpu_switch and nic_switch go together")
        switches = max((*self.gpu_switch, *self.nic_switch), default=-1) + 1
        if self.switch_socket and len(self.switch_socket) < switches:
            raise ValueError(f"switch_socket names {len(self.switch_socket)} of {switches} switches")
        if self.nic_switch and max(self.gpu_nic, default=0) >= len(self.nic_switch):
            raise ValueError(f"gpu_nic names a NIC that nic_switch, a list of {len(self.nic_switch)}, lacks")
        return self


class MeasuredFigure(Spec):
    """What stands behind a figure that was measured."""

    rel_sigma: float = Field(ge=0, description="one standard deviation of ln(true / figure)")
    points: int = Field(gt=0, description="measured points behind it")
    source: str = ""


class BackgroundSpec(Spec):
    """Traffic of another job, steady for as long as a step takes; what it does not get is not made up for later.

    all_to_all: each of its GPUs sends `bytes_per_s`, spread evenly over the others. stream: each GPU of `gpus` sends
    `bytes_per_s` to the GPU at the same place of `to` (a transfer of KV cache from prefill to decode, for one).
    """

    kind: Literal["all_to_all", "stream"]
    gpus: tuple[int, ...] = Field(min_length=1, description="GPUs of the cluster, from 0, that send")
    to: tuple[int, ...] = Field(default=(), description="stream: the GPU that each of them sends to")
    bytes_per_s: float = Field(gt=0, description="what each GPU would send if nothing stood in the way")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if any(gpu < 0 for gpu in (*self.gpus, *self.to)):
            raise ValueError("GPUs count from 0")
        if self.kind == "stream" and len(self.to) != len(self.gpus):
            raise ValueError(f"a stream needs one receiver for each sender: {len(self.to)} for {len(self.gpus)}")
        if self.kind == "stream" and any(one == other for one, other in zip(self.gpus, self.to, strict=True)):
            raise ValueError("a stream goes from one GPU to another")
        if self.kind == "all_to_all" and self.to:
            raise ValueError("an all_to_all goes to all its gpus: leave `to` out")
        if self.kind == "all_to_all" and (len(self.gpus) < 2 or len(set(self.gpus)) < len(self.gpus)):
            raise ValueError("an all_to_all needs two gpus or more, each once")
        return self


class ClusterSpec(Spec):
    """A homogeneous cluster. Link rates are for one GPU and one direction."""

    name: str
    gpu: GpuSpec
    nodes: int = Field(default=1, gt=0)
    gpus_per_node: int = Field(default=8, gt=0)
    nvlink_bytes_per_s: float = Field(ge=0, description="0 = no NVLink: a node's GPUs meet over PCIe")
    nic_bytes_per_s: float = Field(gt=0, description="rate of one NIC: all that a GPU can use when it shares it not")
    pcie_bytes_per_s: float = Field(gt=0)
    nvlink_latency_s: float = Field(default=2e-6, ge=0)
    nic_latency_s: float = Field(default=5e-6, ge=0)
    pcie_latency_s: float = Field(default=1e-5, ge=0, description="between two GPUs of a node without NVLink; assumed")
    nvlink_domain_gpus: int = Field(default=0, ge=0, description="GPUs that share NVLink; 0 = one node")
    node: NodeLayout = Field(default_factory=NodeLayout)
    socket_bytes_per_s: float = Field(default=0, ge=0, description="between the CPU sockets of a node; 0 = as PCIe")
    rails: bool = Field(default=True, description="NIC i of every node on leaf switch i; else a node's NICs on its own")
    nodes_per_leaf: int = Field(default=0, ge=0, description="0 = all nodes with rails, one without")
    oversubscription: float = Field(default=1, ge=1, description="what a leaf's NICs send over its uplink's rate")
    background: tuple[BackgroundSpec, ...] = Field(default=(), description="traffic of other jobs; `des` alone sees it")
    measured: dict[LinkFigure, MeasuredFigure] = Field(
        default_factory=dict, description="link figures that were measured; all others are assumed"
    )
    sources: dict[str, str] = Field(default_factory=dict, description="field -> where the figure comes from")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.nvlink_bytes_per_s and self.nvlink_domain_gpus:
            raise ValueError("nvlink_domain_gpus without NVLink: give nvlink_bytes_per_s")
        for name in ("gpu_nic", "gpu_switch"):
            listed = len(getattr(self.node, name))
            if listed and listed != self.gpus_per_node:
                raise ValueError(f"node.{name} lists {listed} GPUs of {self.gpus_per_node}")
        self.check_background()
        if self.node.nic_switch and len(self.node.nic_switch) <= max(self.gpu_nic):
            raise ValueError(f"node.nic_switch lists {len(self.node.nic_switch)} NICs of {max(self.gpu_nic) + 1}")
        return self

    def check_background(self) -> None:
        """Whether the background's GPUs are the cluster's. Raises ValueError."""
        highest = max((gpu for job in self.background for gpu in (*job.gpus, *job.to)), default=0)
        if highest >= self.gpus:
            raise ValueError(f"background names GPU {highest} of a cluster of {self.gpus}")

    @property
    def gpus(self) -> int:
        """All GPUs of the cluster."""
        return self.nodes * self.gpus_per_node

    @property
    def domain_gpus(self) -> int:
        """GPUs that reach each other without a NIC: over NVLink, or over PCIe where there is none."""
        return self.nvlink_domain_gpus or self.gpus_per_node

    def domains_of(self, nodes: int) -> int:
        """Domains that so many neighbouring nodes lie in: one for each node, or fewer where NVLink joins several."""
        return min(nodes, -(-nodes * self.gpus_per_node // self.domain_gpus))

    @property
    def near_bytes_per_s(self) -> float:
        """Rate of a GPU to the others of its domain: NVLink's, or PCIe's where there is none."""
        return self.nvlink_bytes_per_s or self.pcie_bytes_per_s

    @property
    def near_latency_s(self) -> float:
        """Latency to another GPU of the domain: NVLink's, or PCIe's where there is none."""
        return self.nvlink_latency_s if self.nvlink_bytes_per_s else self.pcie_latency_s

    @property
    def gpu_nic(self) -> tuple[int, ...]:
        """NIC of its node that each GPU of a node uses."""
        return self.node.gpu_nic[: self.gpus_per_node] or tuple(range(self.gpus_per_node))

    @property
    def nics_per_node(self) -> int:
        """NICs of a node that its GPUs use, as far as the highest numbered one."""
        return max(self.gpu_nic) + 1

    @property
    def shared_nic_bytes_per_s(self) -> float:
        """Network rate of one GPU of the most shared NIC while all GPUs send."""
        return self.nic_bytes_per_s / max(self.gpu_nic.count(nic) for nic in self.gpu_nic)
