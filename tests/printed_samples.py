"""What nccl-tests, DeepEP's tests and nvidia-smi print, and CSVs of published figures: made up in their exact shape.

Times are drawn from a latency and a rate; every rate is computed from them as the programs do.
"""

from __future__ import annotations

from profiles.importers.deepep_bytes import NORMAL_BYTES, visited

GPU = "NVIDIA H100 80GB HBM3"
TABLE = """#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw  #wrong     time   algbw   busbw  #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)             (us)  (GB/s)  (GB/s)
"""


def nccl_line(size: int, time_us: float, share: float, redop: str = "none", root: str = "-1", half: str = "") -> str:
    """A line as src/util.cu prints it: getFloatStr gives two decimals below 1,000."""
    rate = size / time_us / 1e3
    out = f"{_figure(time_us, 7)}  {_figure(rate, 6)}  {_figure(rate * share, 6)}       0{half}"
    into = f"{_figure(1.02 * time_us, 7)}  {_figure(rate / 1.02, 6)}  {_figure(rate / 1.02 * share, 6)}     N/A{half}"
    return f"{size:12d}  {size // 4:12d}  {'float':>8}  {redop:>6}  {root:>6}  {out}  {into}"


def _figure(value: float, width: int) -> str:
    power = len(str(int(value)))
    places = 2 if power < width - 2 else 1 if power < width - 1 else 0
    return f"{value:{width}.{places}f}"


def nccl_log(
    program: str = "alltoall", hosts: tuple[str, ...] = ("node-a", "node-b"), each: int = 8, library: str = "22704",
    sizes: tuple[int, ...] = (1024, 65536, 1048576, 16777216, 268435456), latency_us: float = 30.0,
    bytes_per_us: float = 40e3,
) -> str:  # fmt: skip
    """A log of nccl-tests 2.17 over some hosts; a size of 0 stands first, as -b 8 gives it."""
    ranks = len(hosts) * each
    share = 2 * (ranks - 1) / ranks if program == "all_reduce" else (ranks - 1) / ranks
    redop = "sum" if program in ("all_reduce", "reduce_scatter") else "none"
    lines = [
        f"# nccl-tests version 2.17.6 nccl-headers={library} nccl-library={library}",
        f"# Collective test starting: {program}_perf",
        f"# nThread 1 nGpus 1 minBytes 8 maxBytes {sizes[-1]} step: 16(factor) warmup iters: 1 iters: 20 agg iters: 1",
        "#",
        "# Using devices",
        *(
            f"#  Rank {host * each + device:2d} Group  0 Pid {4000 + host * each + device:6d} on {name:>10s} device "
            f"{device:2d} [0000:{16 + device:02x}:00] {GPU}"
            for host, name in enumerate(hosts)
            for device in range(each)
        ),
    ]
    zero = nccl_line(0, 3.2, share, redop) + "\n" if program == "alltoall" else ""
    body = [nccl_line(size, latency_us + size / bytes_per_us, share, redop) for size in sizes]
    end = "# Out of bounds values : 0 OK\n# Avg bus bandwidth    : 12.5 \n#\n"
    return (
        "\n".join(lines)
        + "\n"
        + TABLE
        + zero
        + "\n".join(body)
        + f"\n{end}# Collective test concluded: {program}_perf\n"
    )


def deepep_internode(
    form: str = "rate", tokens: int = 4096, hidden: int = 7168, top_k: int = 8, experts: int = 256, ep: int = 16,
    nodes: int = 2, groups: int = 2, us: float = 1600.0, notify_us: float = 80.0,
) -> str:  # fmt: skip
    """A log of test_internode.py in one of its three forms (rate, named, sum); the best dispatches take `us`."""

    def figures(dtype: str, time_us: float) -> str:
        sent = tokens * hidden * NORMAL_BYTES[dtype] / time_us / 1e3
        rates = (
            f"{sent * visited(nodes, experts, top_k, groups, nodes):.2f} GB/s (RDMA), "
            f"{sent * visited(ep, experts, top_k, groups, nodes):.2f} GB/s (NVL)"
        )
        return {
            "rate": f": {rates}",
            "named": f", transmit: {time_us:.2f} us, notify: {notify_us:.2f} us, BW: {rates}",
            "sum": f": {notify_us:.0f} + {time_us:.0f} us, {rates}",
        }[form]

    lines = [
        f"[config] num_tokens={tokens}, hidden={hidden}, num_topk_groups={groups}, num_topk={top_k}",
        "[layout] Kernel performance: 0.044 ms",
        "",
        "[testing] Running with BF16, without top-k (async=False, previous=False) ... passed",
        f"[tuning] SMs 24, NVL chunk 4, RDMA chunk 4{figures('fp8', 2 * us)} ",
    ]
    for name, dtype, time_us in (
        ("dispatch (FP8)", "fp8", us),
        ("dispatch (BF16)", "bf16", 1.8 * us),
        ("combine", "bf16", 2 * us),
    ):
        lines.append(f"[tuning] Best {name}: SMs 24, NVL chunk 28, RDMA chunk 24{figures(dtype, time_us)}")
    return "\n".join(lines) + "\n"


def deepep_intranode(us: float = 500.0, timed: bool = True) -> str:
    """A log of test_intranode.py on eight GPUs, 256 experts; the later form with its time, or the earlier one."""
    lines = ["[config] num_tokens=4096, hidden=7168, num_topk=8", "[layout] Kernel performance: 0.041 ms", ""]
    for name, joint, dtype, time_us in (
        ("dispatch (FP8)", ",", "fp8", us), ("dispatch (BF16)", ",", "bf16", 1.9 * us),
        ("combine", ":", "bf16", 2 * us),
    ):  # fmt: skip
        rate = 4096 * 7168 * NORMAL_BYTES[dtype] * visited(8, 256, 8) / time_us / 1e3
        told = f", t: {time_us:.2f} us" if timed else ""
        lines.append(f"[tuning] SMs 24, NVL chunk 4: {rate / 2:.2f} GB/s (NVL) ")
        lines.append(f"[tuning] Best {name}: SMs 24, NVL chunk 8{joint} {rate:.2f} GB/s (NVL){told}")
    return "\n".join(lines) + "\n"


def deepep_low_latency(
    ranks: tuple[int, ...] = tuple(range(8)), tokens: int = 128, hidden: int = 7168, top_k: int = 8, us: float = 77.0
) -> str:
    """A log of test_low_latency.py; rank r takes a microsecond more than the one before. Two ranks share a line."""
    pairs = tokens * top_k - 6  # six selections fell to the mask
    lines = ["Allocating buffer size: 2116.291072 MB ..."]
    for rank in ranks:
        d, c = us + rank, 1.5 * us + rank
        sent, back = pairs * (hidden * 1.03125 + 16), pairs * hidden * 2
        lines.append(
            f"[rank {rank}] Dispatch + combine bandwidth: {(sent + back) / (d + c) / 1e3:.2f} GB/s, "
            f"avg_t={d + c:.2f} us, min_t={d:.2f} us, max_t={2 * c:.2f} us"
        )
        both = (
            f"[rank {rank}] Dispatch bandwidth: {sent / d / 1e3:.2f} GB/s, avg_t={d:.2f} us | "
            f"Combine bandwidth: {back / c / 1e3:.2f} GB/s, avg_t={c:.2f} us"
        )
        if rank == 1:
            lines[-2] += both
        else:
            lines.append(both)
        lines.append(f"[rank {rank}] Dispatch send/recv time: 20.1 + 9.9 us | Combine send/recv time: 30.2 + 12.0 us")
    return "\n".join(lines) + "\n"


LEGEND = """
Legend:

  X    = Self
  SYS  = across NUMA nodes
  NODE = across host bridges of a NUMA node
  PIX  = at most one PCIe bridge
  NV#  = so many NVLinks
"""


def topo(tabs: bool = True, nvlink: str = "NV18", each: int = 2) -> str:
    """Eight GPUs on two sockets; every `each` of them share a PCIe switch with one NIC, and one NIC is far."""
    nics = 8 // each

    def socket(gpu: int) -> int:
        return gpu // 4

    def gpu_pair(one: int, other: int) -> str:
        if one == other:
            return "X"
        return nvlink or ("PXB" if one // each == other // each else "NODE" if socket(one) == socket(other) else "SYS")

    def nic_link(gpu: int, nic: int) -> str:
        if nic == nics:
            return "SYS" if socket(gpu) else "NODE"
        return "PIX" if gpu // each == nic else "NODE" if socket(gpu) == socket(nic * each) else "SYS"

    def nic_pair(one: int, other: int) -> str:
        if one == other:
            return "X"
        first, second = (0 if nic == nics else socket(nic * each) for nic in (one, other))
        return "NODE" if first == second else "SYS"

    join = "\t" if tabs else "    "
    names = [*(f"GPU{gpu}" for gpu in range(8)), *(f"NIC{nic}" for nic in range(nics + 1))]
    header = join + join.join([*names, "CPU Affinity", "NUMA Affinity", "GPU NUMA ID"])
    lines = [f"\x1b[4m{header}\x1b[0m" if tabs else header]
    for gpu in range(8):
        links = [gpu_pair(gpu, other) for other in range(8)] + [nic_link(gpu, nic) for nic in range(nics + 1)]
        cpus = f"{48 * socket(gpu)}-{48 * socket(gpu) + 47}"
        lines.append(join.join([f"GPU{gpu}", *links, cpus, str(socket(gpu)), "", "N/A"]))
    for nic in range(nics + 1):
        links = [nic_link(gpu, nic) for gpu in range(8)] + [nic_pair(nic, other) for other in range(nics + 1)]
        lines.append(join.join([f"NIC{nic}", *links, ""]))
    legend = "".join(f"  NIC{nic}: mlx5_{nic}\n" for nic in range(nics)) + f"  NIC{nics}: mlx5_bond_0\n"
    return "\n".join(lines) + "\n" + LEGEND + "\nNIC Legend:\n\n" + legend


EXCHANGES = """src,commit,backend,gpu,nic,mode,op,ep,tokens_per_rank,hidden,topk,dtype,sms,\
latency_us,bw_GBps,bw_kind,note
lib,abc (2025-02),DeepEP v1,H800,400Gb/s,normal intranode,dispatch,8,4096,7168,8 (top-4 groups),fp8,\
,,153.0,bottleneck NVLink,
lib,abc (2025-02),DeepEP v1,H800,400Gb/s,normal internode,combine,16,4096,7168,8 (top-4 groups),\
bf16,,,43.0,bottleneck RDMA,
lib,abc (2025-02),DeepEP v1,H800,400Gb/s,low-latency,dispatch,8,128,7168,8,fp8,,163.0,46.0,RDMA (logical),
lib,abc,HybridEP,H800,IB,"normal, kernel only",dispatch,16,4096,7168,8,fp8,16,,68.48,\
algorithm bw (IB),"uniform router, 8 local experts"
lib,abc,DeepEP v1,H100,400Gb/s,low-latency,combine,8,128,7168,8,bf16,,318.0,46.0,RDMA (logical),
lib,abc,pplx,H800,,pplx,dispatch,8,1,,,,,41.6,,,+-1.3
lib,abc,Torch AtA,H800,,pplx,all_to_all (raw),8,1,,,,,24.4,,,
lib,abc,NVLinkOneSided,not stated,,one-sided,dispatch,8,1,7168,8,bf16,,18.9,6.07,"logical: bs*min(ep,topk)*14336/lat",
"""
ALL_TO_ALL = """src,system,nodes,ranks,size_bytes,time_us_oop,algbw_GBps,busbw_GBps
"a post, NCCL 2.28.7",H800 x4,1,4,1048576,40.00,26.21,19.66
rccl-tests,"8 GPUs, model not printed",1,8,128,38.24,,0.00
results,H800 x32,4,32,67108864,,,45.1
results,H800 x32,4,32,peak,,,53.9
a post,H200 x8,1,8,1024,10.80,0.09,0.08
"""
GATHERS = """src,gpu,op,gpus,per_gpu_MB,latency_us
a figure,H800,all_gather,2,8,39
a figure,H800,reduce_scatter,4,64,380
"""
DEEPGEMM = """src,commit,kind,groups,m_per_group,n,k,tflops,GBps,speedup_vs_cutlass,derived_time_us
"a README (H800 SXM5, FP8)",a6,Normal GEMMs for dense models,1,64,2112,7168,206,1688,2.7,9.4
"a README (H800 SXM5, FP8)",a6,Grouped GEMMs for MoE models (masked layout),4,256,4096,7168,932,2064,1.1,64.5
"""
CUBLASLT = """src,gpu,kernel,m,n,k,tflops
a guide,H800 SXM,cuBLASLt FP8,4096,4096,4096,1216.9
"""
PUBLISHED = {
    "exchanges.csv": EXCHANGES, "all_to_all.csv": ALL_TO_ALL, "gathers.csv": GATHERS, "deepgemm.csv": DEEPGEMM,
    "cublaslt.csv": CUBLASLT,
}  # fmt: skip
