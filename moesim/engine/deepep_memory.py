"""DeepEP's buffers on one GPU, as an engine sizes them from its hints (csrc/config.hpp, deep_ep/buffer.py)."""

from __future__ import annotations

import math

from moesim.units import MIB

# DeepEP, csrc/kernels/configs.cuh and csrc/config.hpp (buffer size hints), deep_ep/buffer.py (defaults).
DEEPEP_NVLINK_PEERS = 8
DEEPEP_CHANNELS = 10  # half of the 20 SMs that the normal kernels use by default
DEEPEP_METADATA_BYTES = 8 + 128 * 8 + 128 * 4 + 128 * 4  # source, top-k ids, top-k weights and scales of one token
DEEPEP_ALIGNMENT_BYTES = 128
DEEPEP_RDMA_MARGIN_BYTES = MIB
DEEPEP_GROUP = 128  # elements that share one scale
NVSHMEM_GRANULARITY_BYTES = 2**29
# Ranks -> (NVLink, RDMA) tokens of a receive chunk: the larger of the recommended dispatch and combine configurations,
# the RDMA chunk rounded up to whole send chunks.
DEEPEP_RECEIVE_TOKENS: dict[int, tuple[int, int]] = {
    8: (256, 0),
    16: (288, 140),
    24: (288, 140),
    32: (288, 140),
    64: (288, 140),
    128: (560, 132),
    144: (720, 132),
    160: (720, 132),
}


def deepep_buffer_bytes(
    hidden: int, ranks: int, slots: int, *, normal: bool = True, low_latency_tokens: int = 0
) -> float:
    """DeepEP's buffers on one GPU, as an engine sizes them from DeepEP's hints (csrc/config.hpp, deep_ep/buffer.py).

    ranks: the EP group. slots: experts of a layer with their replicas, over all ranks. normal: the high-throughput
    kernels are used. low_latency_tokens: dispatch limit per rank of the low-latency kernels, 0 = not used. Both kinds
    share the RDMA buffer, which NVSHMEM allocates in steps of 512 MiB.
    """
    nvlink = float(normal and deepep_nvlink_bytes(hidden, ranks))
    rdma = deepep_rdma_bytes(hidden, ranks) if normal else 0
    if low_latency_tokens:
        rdma = max(rdma, deepep_low_latency_bytes(hidden, slots, low_latency_tokens, local=slots // ranks))
    return nvlink + math.ceil(rdma / NVSHMEM_GRANULARITY_BYTES) * NVSHMEM_GRANULARITY_BYTES


def deepep_nvlink_bytes(hidden: int, ranks: int) -> int:
    """NVLink buffer of the normal kernels: a receive queue for each channel and peer."""
    chunk, _ = _receive_tokens(ranks)
    nodes = max(ranks // DEEPEP_NVLINK_PEERS, 1)
    queues = DEEPEP_CHANNELS * min(ranks, DEEPEP_NVLINK_PEERS)
    return _aligned(queues * ((2 * nodes + 3) * 4 + chunk * (2 * hidden + DEEPEP_METADATA_BYTES)))


def deepep_rdma_bytes(hidden: int, ranks: int) -> int:
    """RDMA buffer of the normal kernels: send and receive queues for each channel and node; none within one node."""
    if ranks <= DEEPEP_NVLINK_PEERS:
        return 0
    _, chunk = _receive_tokens(ranks)
    queues = DEEPEP_CHANNELS * max(ranks // DEEPEP_NVLINK_PEERS, 1)
    token = 2 * hidden + DEEPEP_METADATA_BYTES + 16
    counters = (2 * DEEPEP_NVLINK_PEERS + 2) * 4
    return _aligned(2 * queues * (counters + chunk * token) + DEEPEP_RDMA_MARGIN_BYTES)


def deepep_low_latency_bytes(hidden: int, slots: int, tokens: int, *, local: int) -> int:
    """RDMA buffer of the low-latency kernels: two send and two receive buffers, a message for each slot and token."""
    scales = hidden // DEEPEP_GROUP
    dispatch = 16 + max(2 * hidden, hidden + 4 * scales)
    combine = 4 * scales + 2 * hidden
    send = max(tokens * dispatch, slots * tokens * combine)
    receive = slots * tokens * max(dispatch, combine)
    signals = _aligned(8 * slots + 4 * local)
    return _aligned(2 * (send + receive + signals) + DEEPEP_ALIGNMENT_BYTES)


def _receive_tokens(ranks: int) -> tuple[int, int]:
    size = next((size for size in sorted(DEEPEP_RECEIVE_TOKENS) if size >= ranks), max(DEEPEP_RECEIVE_TOKENS))
    return DEEPEP_RECEIVE_TOKENS[size]


def _aligned(size: int) -> int:
    return -(-size // DEEPEP_ALIGNMENT_BYTES) * DEEPEP_ALIGNMENT_BYTES
