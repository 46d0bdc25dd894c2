"""The bytes behind the bandwidths that DeepEP's tests print, by the definitions in their source.

deepseek-ai/DeepEP: tests/test_intranode.py, test_internode.py and test_low_latency.py, and of the hybrid-ep branch
tests/test_hybrid_ep.py with tests/utils.py. NVLink bytes are those of the tokens that a rank receives, its own
included, each counted once; RDMA bytes those of the (token, node) pairs that a rank sends, its own node included (so
they can exceed the wire's); low-latency bytes count every selected expert. The tests route at random, so the counts
are those that their routing is expected to give; real draws differ by well under one per cent at 4,096 tokens.
"""

from __future__ import annotations

import functools
import math

import numpy as np

# One float32 scale for 128 elements of fp8: fp8_factor = (1 + 4 / 128) / 2 of bf16's bytes (test_internode.py).
NORMAL_BYTES = {"fp8": 1.0 + 4.0 / 128.0, "bf16": 2.0}
LOW_LATENCY_HEADER_BYTES = 16  # before each token of a dispatch (test_low_latency.py, num_fp8_bytes)
LOGFMT10 = 10.0 / 8.0 + 4.0 / 128.0  # 10 bits an element and a scale for 128 (num_logfmt10_bytes)
MASKED = 10  # test_low_latency.py takes away up to 10 selections at random
DRAWN_TOKENS = 4096  # as many as the tests route
LARGEST_EXPERTS = 4096


def low_latency_bytes(dtype: str, hidden: int, step: str) -> float:
    """Bytes of one (token, expert) pair of a low-latency dispatch or combine; dtype fp8, bf16 or logfmt10."""
    if dtype == "fp8":
        return hidden * NORMAL_BYTES["fp8"] + LOW_LATENCY_HEADER_BYTES
    per_element = {"bf16": 2.0, "logfmt10": LOGFMT10}[dtype]
    return hidden * per_element


@functools.lru_cache(maxsize=256)
def visited(parts: int, experts: int, top_k: int, groups: int = 0, of: int = 0) -> float:
    """How many of `parts` equal parts of the experts a token's top_k experts lie in, on average over random scores.

    groups, of: the token first keeps the `groups` of `of` nodes whose best expert scores highest (0: no such limit).
    Exact without that limit (a hypergeometric miss); with it, drawn by the test's own rule (create_grouped_scores) with
    a fixed seed.
    """
    if groups and groups < of:
        return _drawn(parts, experts, top_k, groups, of)
    inside = experts // parts
    missed = math.prod((experts - inside - taken) / (experts - taken) for taken in range(top_k))
    return parts * (1.0 - missed if top_k <= experts - inside else 1.0)


def _drawn(parts: int, experts: int, top_k: int, groups: int, of: int) -> float:
    scores = np.random.default_rng(0).random((DRAWN_TOKENS, experts), dtype=np.float32)
    best = scores.reshape(DRAWN_TOKENS, of, -1).max(axis=-1)
    lowest_kept = np.partition(best, of - groups, axis=-1)[:, of - groups, None]
    kept = np.repeat(best >= lowest_kept, experts // of, axis=-1)
    chosen = np.argpartition(np.where(kept, scores, -1.0), experts - top_k, axis=-1)[:, experts - top_k :]
    part = np.sort(chosen // (experts // parts), axis=-1)
    return float(1.0 + (np.diff(part, axis=-1) != 0).sum(axis=-1).mean())


def fault_of(experts: int, top_k: int, ep: int, nodes: int, groups: int = 0) -> str:
    """Why no such exchange can have run; empty where it can."""
    if not 0 < experts <= LARGEST_EXPERTS:
        return f"{experts} experts are not between 1 and {LARGEST_EXPERTS}"
    if not 0 < top_k <= experts:
        return f"top-{top_k} of {experts} experts"
    if ep < 2 or experts % ep:
        return f"{experts} experts are not equal parts on {ep} ranks"
    if nodes < 1 or ep % nodes:
        return f"{ep} ranks are not equal parts on {nodes} nodes"
    if groups and (groups > nodes or top_k > groups * (experts // nodes)):
        return f"top-{top_k} from {groups} of {nodes} nodes with {experts // nodes} experts each"
    return ""
