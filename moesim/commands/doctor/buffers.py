"""What the communication libraries take of a GPU's memory, against what weights and activations leave.

DeepEP's figures are the ledger's (`engine.memory`), formula by formula; NCCL's are what its source would allocate,
beside the observed figure that the ledger uses.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

from moesim.commands.doctor.findings import Finding
from moesim.engine.deepep_memory import (
    NVSHMEM_GRANULARITY_BYTES,
    deepep_low_latency_bytes,
    deepep_nvlink_bytes,
    deepep_rdma_bytes,
)
from moesim.engine.memory import MemoryLedger
from moesim.spec.model import ModelSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import DispatchSpec
from moesim.units import MIB, human_bytes

# deepseek-ai/DeepEP, csrc/kernels/configs.cuh, NUM_WORKSPACE_BYTES: beside the buffers, not in the ledger.
DEEPEP_WORKSPACE_BYTES = 32 * MIB
# csrc/deep_ep.cpp, Buffer::Buffer: above these it refuses to start.
INT_MAX = 2**31 - 1
# NVIDIA/nccl, src/init.cc: DEFAULT_BUFFSIZE, DEFAULT_LL_BUFFSIZE and DEFAULT_LL128_BUFFSIZE (lines or elements of a
# thread x threads x 8 steps x bytes), for each connection of a channel; collectives give every channel its own
# (NVIDIA/nccl#1450).
NCCL_SIMPLE_BYTES = 4 * MIB
NCCL_LL_BYTES = 8 * 512 * 8 * 16
NCCL_LL128_BYTES = 120 * 640 * 8 * 8
# Connections on which a rank receives, of one channel: one in a ring; a parent and two children in a tree.
RING_CONNECTIONS, TREE_CONNECTIONS = 1, 3
# How many channels NCCL picks is known when it runs (NCCL_DEBUG=INFO); assumed: between these on an NVLink node.
FEW_CHANNELS, MANY_CHANNELS = 16, 32
# Above this share of what is left, buffers are worth a look.
LARGE_SHARE = 0.2


def buffers(
    model: ModelSpec,
    parallel: ParallelSpec,
    dispatch: DispatchSpec,
    slots: int,
    low_latency_tokens: int,
    counted: MemoryLedger,
    environ: Mapping[str, str] | None = None,
) -> list[Finding]:
    """DeepEP's and NCCL's buffers of one GPU against the memory that they share with the KV cache.

    slots: expert slots of a layer over all ranks. low_latency_tokens: the engine's dispatch limit per rank. environ:
    where NCCL_BUFFSIZE and NCCL_MAX_NCHANNELS are looked for; this process's by default.
    """
    environ = os.environ if environ is None else environ
    communication = ("communication_buffers", "low_latency_tensors", "nccl_buffers")
    left = counted.items.get("kv_cache", 0.0) + sum(counted.items.get(name, 0.0) for name in communication)
    return [
        *_deepep(model, parallel, dispatch, slots, low_latency_tokens, counted, left),
        *_nccl(parallel, counted, left, environ),
    ]


def _deepep(
    model: ModelSpec,
    parallel: ParallelSpec,
    dispatch: DispatchSpec,
    slots: int,
    tokens: int,
    counted: MemoryLedger,
    left: float,
) -> list[Finding]:
    if dispatch.backend != "deepep" or parallel.ep == 1:
        return []
    normal, low_latency = dispatch.mode in ("auto", "normal"), dispatch.mode in ("auto", "low_latency")
    nvlink = deepep_nvlink_bytes(model.hidden, parallel.ep) if normal else 0
    rdma = deepep_rdma_bytes(model.hidden, parallel.ep) if normal else 0
    low = deepep_low_latency_bytes(model.hidden, slots, tokens, local=slots // parallel.ep) if low_latency else 0
    heap = math.ceil(max(rdma, low) / NVSHMEM_GRANULARITY_BYTES) * NVSHMEM_GRANULARITY_BYTES
    parts = [f"NVLink queues {human_bytes(nvlink)}"] if nvlink else []
    parts += [f"RDMA queues {human_bytes(rdma)}"] if rdma else []
    parts += [f"low-latency buffers {human_bytes(low)} ({tokens} tokens a rank, {slots} slots)"] if low else []
    if heap:
        parts.append(f"NVSHMEM heap for the larger of them {human_bytes(heap)} in steps of 512 MiB")
    tensors = counted.items.get("low_latency_tensors", 0.0)
    parts += [f"received and computed rows {human_bytes(tensors)}"] if tensors else []
    share = (nvlink + heap + tensors) / left if left > 0 else math.inf
    detail = (
        f"{'; '.join(parts)}; {share:.1%} of {human_bytes(left)} that other items leave "
        f"(not counted: its workspace of {human_bytes(DEEPEP_WORKSPACE_BYTES)}, NVSHMEM's own state)"
    )
    mend = (
        "lower the dispatch limit or placement.redundant_experts"
        if low > rdma
        else "use mode low_latency or more memory"
    )
    found = [Finding("deepep buffers", "ok", detail)]
    if share > LARGE_SHARE:
        found = [Finding("deepep buffers", "warn", detail, mend)]
    if rdma and nvlink > INT_MAX:
        told = f"NVLink queues of {human_bytes(nvlink)} are beyond the 2 GiB that it takes beside RDMA"
        found.append(Finding("deepep buffers", "fault", told, "lower Buffer.num_sms"))
    if not low and rdma > INT_MAX:
        told = f"RDMA queues of {human_bytes(rdma)} are beyond the 2 GiB of its normal mode"
        found.append(Finding("deepep buffers", "fault", told, "lower Buffer.num_sms"))
    return found


def nccl_connection_bytes(simple: int = NCCL_SIMPLE_BYTES) -> int:
    """Buffers of one connection of one channel, over NCCL's three protocols."""
    return simple + NCCL_LL_BYTES + NCCL_LL128_BYTES


def nccl_communicator_bytes(channels: int, connections: int, simple: int = NCCL_SIMPLE_BYTES) -> int:
    """Buffers of one communicator."""
    return channels * connections * nccl_connection_bytes(simple)


def _nccl(parallel: ParallelSpec, counted: MemoryLedger, left: float, environ: Mapping[str, str]) -> list[Finding]:
    axes = {name: getattr(parallel, name) for name in ("tp", "cp", "decode_cp", "attention_dp", "pp")}
    used = [name for name, size in axes.items() if size > 1]
    if not used:
        return []
    simple, wrong = _number(environ, "NCCL_BUFFSIZE", NCCL_SIMPLE_BYTES)
    channels, also_wrong = _number(environ, "NCCL_MAX_NCHANNELS", MANY_CHANNELS)
    found = [
        Finding("nccl buffers", "warn", f"{name} is {environ[name]!r}", "give a whole number of bytes or channels")
        for name in (*wrong, *also_wrong)
    ]
    few = nccl_communicator_bytes(min(FEW_CHANNELS, channels), RING_CONNECTIONS, simple)
    many = nccl_communicator_bytes(channels, RING_CONNECTIONS + TREE_CONNECTIONS, simple)
    ledger = counted.items.get("nccl_buffers", 0.0)
    plural = "s" if len(used) > 1 else ""
    detail = (
        f"{len(used)} communicator{plural} ({', '.join(used)}): {human_bytes(ledger)} in the ledger, as observed; by "
        f"NCCL's source {human_bytes(len(used) * few)} ({min(FEW_CHANNELS, channels)} channels, rings) to "
        f"{human_bytes(len(used) * many)} ({channels} channels, rings and trees), at "
        f"{human_bytes(nccl_connection_bytes(simple))} a connection"
    )
    worst = len(used) * many - ledger
    if left > 0 and worst / left > LARGE_SHARE:
        mend = "leave room with serving.memory.reserved_bytes, or set NCCL_MAX_NCHANNELS or NCCL_BUFFSIZE"
        return [*found, Finding("nccl buffers", "warn", detail, mend)]
    return [*found, Finding("nccl buffers", "ok", detail)]


def _number(environ: Mapping[str, str], name: str, default: int) -> tuple[int, list[str]]:
    """A positive whole number from the environment, and the name if it is none."""
    if name not in environ:
        return default, []
    text = environ[name].strip()
    return (int(text), []) if text.isdecimal() and int(text) > 0 else (default, [name])
