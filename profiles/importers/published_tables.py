"""What each known CSV of published figures means, column by column: one converter a header."""

from __future__ import annotations

import re
from typing import Any

from moesim.units import GIGA, MICRO
from profiles.importers.deepep_bytes import NORMAL_BYTES, fault_of, low_latency_bytes, visited
from profiles.importers.printed import whole
from profiles.importers.published import (
    MB,
    Context,
    Convert,
    LeftOut,
    Record,
    Wrong,
    count,
    near,
    nodes_of,
    of_this_gpu,
    optional,
    positive,
    product,
    provenance,
    same_seconds,
)
from profiles.record import DEEPEP, LATENCY

Row = tuple[str, dict[str, Any]]
EXCHANGES = (
    "src", "commit", "backend", "gpu", "nic", "mode", "op", "ep", "tokens_per_rank", "hidden", "topk", "dtype", "sms",
    "latency_us", "bw_GBps", "bw_kind", "note",
)  # fmt: skip
ALL_TO_ALL = ("src", "system", "nodes", "ranks", "size_bytes", "time_us_oop", "algbw_GBps", "busbw_GBps")
GATHERS = ("src", "gpu", "op", "gpus", "per_gpu_MB", "latency_us")
DEEPGEMM = (
    "src", "commit", "kind", "groups", "m_per_group", "n", "k", "tflops", "GBps", "speedup_vs_cutlass",
    "derived_time_us",
)  # fmt: skip
CUBLASLT = ("src", "gpu", "kernel", "m", "n", "k", "tflops")

# A backend's name in the table -> engine, and the mode that the store files it under. DeepEP's own two modes are what
# an exchange asks for; the others stand in the table under their own names, and price nothing until something asks.
BACKENDS = (("HybridEP", "hybridep", "hybrid_ep"), ("NVLinkOneSided", "trtllm", "one_sided"), ("DeepEP", DEEPEP, ""))
_TOP_K = re.compile(r"(\d+)(?: \(top-(\d+) groups\))?", re.ASCII)
_LOCAL_EXPERTS = re.compile(r"(?:^|\W)(\d+) local experts\b")
_MONTH = re.compile(r"\b(20\d\d)-(\d\d)\b")
EXCHANGE_SLACK = 0.06  # bandwidths of low latency are whole GB/s; routing is drawn, and 10 selections are masked
KERNEL_ONLY = ("kernel only", "Only Kernel Time")


def convert_exchange(row: Record, context: Context) -> Row:
    """comm_ep_kernels: dispatch and combine of EP libraries; latency where there is one, else by `bw_kind`."""
    if row["op"] not in ("dispatch", "combine"):
        raise LeftOut("neither a dispatch nor a combine")
    device = of_this_gpu(row["gpu"], context)
    backend = next((found for found in BACKENDS if row["backend"].startswith(found[0])), None)
    if backend is None:
        raise LeftOut(f"backend {row['backend'].split()[0] if row['backend'] else 'not stated'}")
    for name in ("hidden", "topk", "dtype"):
        if not row[name]:
            raise LeftOut(f"{name} not stated")
    if row["dtype"] not in NORMAL_BYTES:
        raise Wrong(f"dtype is {row['dtype'][:20]!r}, not one of {', '.join(NORMAL_BYTES)}")
    ep, tokens, hidden = (count(row, name) for name in ("ep", "tokens_per_rank", "hidden"))
    top_k, groups = _top_k(row)
    nodes = nodes_of(ep, context)
    groups = min(groups, nodes)
    experts = _experts(row, context, ep)
    fault = fault_of(experts, top_k, ep, nodes, groups)
    if fault:
        raise Wrong(fault)
    latency, rate = optional(row, "latency_us"), optional(row, "bw_GBps")
    if not latency and not rate:
        raise Wrong("neither a latency nor a bandwidth above zero")
    sent = _bytes(row, tokens, hidden, (top_k, groups, experts, ep, nodes))
    if latency and rate and sent and abs(sent / (rate * GIGA) - latency * MICRO) > EXCHANGE_SLACK * latency * MICRO:
        raise Wrong(f"{rate:g} GB/s make {sent / rate / 1e3:.4g} us, not {latency:g}")
    if not latency and not sent:
        raise LeftOut("a bandwidth whose bytes the source does not define")
    seconds = latency * MICRO if latency else (sent or 0.0) / ((rate or 0.0) * GIGA)
    key = {
        "step": row["op"], "mode": _mode(row, backend), "nodes": nodes, "ep": ep, "hidden": hidden, "top_k": top_k,
        "experts": experts, "dtype": row["dtype"], "sms": count(row, "sms") if row["sms"] else 0,
        "tokens": float(tokens),
    }  # fmt: skip
    month = _MONTH.search(f"{row['commit']} {row['backend']}")
    version = f"{month[1]}.{month[2]}" if month else ""
    told = provenance(row, context, engine=backend[1], device=device, kernel=row["backend"], version=version)
    return "exchange", {**key, LATENCY: seconds, **told}


def _top_k(row: Record) -> tuple[int, int]:
    found = _TOP_K.fullmatch(row["topk"])
    top_k, groups = (whole(found[1]), whole(found[2] or "0")) if found else (None, None)
    if not top_k or groups is None:
        raise Wrong(f"topk is {row['topk'][:20]!r}, neither a number nor `8 (top-4 groups)`")
    return top_k, groups


def _experts(row: Record, context: Context, ep: int) -> int:
    """Experts of the layer: the note's local ones times EP, else the option."""
    found = _LOCAL_EXPERTS.search(row["note"])
    if found:
        return (whole(found[1]) or 0) * ep
    if context.experts is None:
        raise LeftOut("the number of experts is not stated (give --experts)")
    if context.experts % ep:
        raise LeftOut(f"--experts {context.experts} are not equal parts on {ep} ranks")
    return context.experts


def _mode(row: Record, backend: tuple[str, str, str]) -> str:
    if row["mode"] == "low-latency":
        return "low_latency"
    name = backend[2] or "normal"
    return f"{name}_kernel" if any(mark in row["mode"] for mark in KERNEL_ONLY) else name


def _bytes(row: Record, tokens: int, hidden: int, shape: tuple[int, int, int, int, int]) -> float | None:
    """The bytes behind the row's bandwidth; None where its kind is not defined by its source.

    `bottleneck` and `algorithm` bandwidths are those that DeepEP's and Hybrid-EP's tests print (deepep_bytes);
    the RDMA ones count the sender's own node too: with 76.8 GB/s through NICs of 50 nothing else is possible.
    """
    top_k, groups, experts, ep, nodes = shape
    kind = row["bw_kind"]
    if kind == "RDMA (logical)":
        return tokens * top_k * low_latency_bytes(row["dtype"], hidden, row["op"])
    if kind == "logical: bs*min(ep,topk)*14336/lat":
        return tokens * min(ep, top_k) * 14336.0
    if kind in ("bottleneck NVLink", "algorithm bw"):
        return tokens * hidden * NORMAL_BYTES[row["dtype"]] * visited(ep, experts, top_k, groups, nodes)
    if kind in ("bottleneck RDMA", "algorithm bw (IB)"):
        return tokens * hidden * NORMAL_BYTES[row["dtype"]] * visited(nodes, experts, top_k, groups, nodes)
    return None


def convert_all_to_all(row: Record, context: Context) -> Row:
    """nccl_alltoall: nccl-tests' columns; a row without a time does not say what its size counts."""
    device = of_this_gpu(row["system"], context)
    nodes, ranks = count(row, "nodes"), count(row, "ranks")
    time = optional(row, "time_us_oop")
    if row["size_bytes"] == "peak":
        raise LeftOut("a peak, at no stated size")
    size = positive(row, "size_bytes")
    if time is None:
        positive(row, "busbw_GBps")
        raise LeftOut("a bus bandwidth only: whether its size is a rank's is not stated")
    if time == 0 or ranks < 2 or ranks % nodes:
        raise Wrong(f"{ranks} ranks on {nodes} nodes in {row['time_us_oop']} us")
    algbw = size / (time * 1e3)
    near(algbw, row, "algbw_GBps", "time_us_oop")
    near(algbw * (ranks - 1) / ranks, row, "busbw_GBps", "time_us_oop")
    engine = "rccl" if "rccl" in row["src"].lower() else "nccl"
    version = re.search(r"NCCL (\d+\.\d+\.\d+)", row["src"])
    told = provenance(
        row, context, engine=engine, device=device, kernel=engine.upper(), version=version[1] if version else ""
    )
    key = {"kind": "all_to_all", "path": "nccl", "gpus": ranks, "nodes": nodes, "bytes": size}
    return "collective", {**key, LATENCY: time * MICRO, **told}


def convert_gathers(row: Record, context: Context) -> Row:
    """nccl_ag_rs_gb200: MB of one GPU; the size of the store is the whole buffer, that times the GPUs.

    Both kinds take the same time at the same figure, so it is the shard in both.
    """
    device = of_this_gpu(row["gpu"], context)
    if row["op"] not in ("all_gather", "reduce_scatter"):
        raise Wrong(f"op is {row['op'][:20]!r}, neither all_gather nor reduce_scatter")
    gpus = count(row, "gpus")
    if gpus < 2:
        raise Wrong("one GPU alone exchanges nothing")
    nodes = nodes_of(gpus, context)
    size = positive(row, "per_gpu_MB") * MB * gpus
    key = {"kind": row["op"], "path": "nccl", "gpus": gpus, "nodes": nodes, "bytes": size}
    told = provenance(row, context, engine="nccl", device=device, kernel="NCCL")
    return "collective", {**key, LATENCY: positive(row, "latency_us") * MICRO, **told}


def convert_deepgemm(row: Record, context: Context) -> Row:
    """deepgemm_h800: dense products with block scales; the grouped ones alone have no table."""
    device = of_this_gpu(row["src"], context)
    groups, rows, n, k = (count(row, name) for name in ("groups", "m_per_group", "n", "k"))
    same_seconds(2.0 * groups * rows * n * k / (positive(row, "tflops") * 1e12), row)
    if row["kind"].startswith("Grouped"):
        raise LeftOut("grouped products alone have no table")
    if not row["kind"].startswith("Normal") or groups != 1:
        raise Wrong(f"kind is {row['kind'][:30]!r} with {groups} groups, neither Normal nor Grouped")
    name = re.search(r"\(([^,)]+)", device)
    told = product(
        row, context, m="m_per_group", dtype="fp8_block", device=name[1] if name else device, kernel="DeepGEMM"
    )
    return "gemm", told


def convert_cublaslt(row: Record, context: Context) -> Row:
    """cublaslt_fp8_azure: fp8 products by rate."""
    device = of_this_gpu(row["gpu"], context)
    if not row["kernel"].endswith("FP8"):
        raise Wrong(f"kernel is {row['kernel'][:30]!r}, not an FP8 product")
    return "gemm", product(row, context, m="m", dtype="fp8", device=device, kernel=row["kernel"])


# Header -> converter.
KNOWN: tuple[tuple[tuple[str, ...], Convert], ...] = (
    (EXCHANGES, convert_exchange),
    (ALL_TO_ALL, convert_all_to_all),
    (GATHERS, convert_gathers),
    (DEEPGEMM, convert_deepgemm),
    (CUBLASLT, convert_cublaslt),
)
