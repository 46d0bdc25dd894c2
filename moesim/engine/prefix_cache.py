"""The prefix cache of each attention-DP rank, compiled: prompt blocks by their hash, evicted least recently used first.

A block is a fixed number of prompt tokens; a request names its blocks by hash, first to last, and equal hashes mean
equal tokens up to there. Blocks that a request uses are locked; those that nobody uses stay until memory is needed.
Rules as in vLLM's automatic prefix caching (docs/design/prefix_caching.md: only full blocks, the last token is always
computed, the tail of a freed prompt is evicted first) and SGLang's radix cache (a prompt computed twice at once is kept
once).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.engine.kernel import kernel

Ints = NDArray[np.int64]

ABSENT = -1


class PrefixCache(NamedTuple):
    """Blocks of requests and what each rank holds; `tokens` in a block, 0 = no cache.

    offsets [requests + 1] into names: dense block ids of each request. uses [ranks, blocks]: requests that use a held
    block, ABSENT where it is not held. older, newer [ranks, blocks + 1]: the unused blocks of a rank as a ring from the
    one to evict first; the last place is the ring's end. idle_tokens [ranks]: tokens in unused blocks. shared
    [requests]: blocks that a request has locked. asked_tokens, found_tokens [ranks]: prompt tokens admitted, and those
    of them found here.
    """

    tokens: int
    offsets: Ints
    names: Ints
    uses: NDArray[np.int32]
    older: NDArray[np.int32]
    newer: NDArray[np.int32]
    idle_tokens: Ints
    shared: Ints
    asked_tokens: Ints
    found_tokens: Ints


def new_prefix_cache(requests: int, ranks: int, tokens: int, offsets: Ints, hashes: Ints) -> PrefixCache:
    """An empty cache for requests whose block hashes are hashes[offsets[i]:offsets[i + 1]]; tokens 0 turns it off."""
    if tokens == 0:
        offsets, hashes = np.zeros(requests + 1, np.int64), np.zeros(0, np.int64)
    names = np.unique(hashes, return_inverse=True)[1].astype(np.int64).ravel()
    blocks = int(names.max()) + 1 if len(names) else 0
    ring = np.full((ranks, blocks + 1), blocks, np.int32)
    return PrefixCache(
        tokens=tokens,
        offsets=offsets.astype(np.int64),
        names=names,
        uses=np.full((ranks, blocks), ABSENT, np.int32),
        older=ring,
        newer=ring.copy(),
        idle_tokens=np.zeros(ranks, np.int64),
        shared=np.zeros(requests, np.int64),
        asked_tokens=np.zeros(ranks, np.int64),
        found_tokens=np.zeros(ranks, np.int64),
    )


@kernel
def find(cache: PrefixCache, rank: int, request: int, target: int) -> tuple[int, int]:
    """Leading blocks of a request that a rank holds, and how many of them are in use; one token is left to compute."""
    found = used = 0
    if cache.tokens == 0:
        return found, used
    first = cache.offsets[request]
    most = min(cache.offsets[request + 1] - first, (target - 1) // cache.tokens)
    while found < most:
        uses = cache.uses[rank, cache.names[first + found]]
        if uses == ABSENT:
            break
        used += uses > 0
        found += 1
    return found, used


@kernel
def _lock(cache: PrefixCache, rank: int, block: int) -> int:
    """Use a held block once more; returns the tokens that stop being idle."""
    cache.uses[rank, block] += 1
    if cache.uses[rank, block] > 1:
        return 0
    older, newer = cache.older[rank, block], cache.newer[rank, block]
    cache.newer[rank, older] = newer
    cache.older[rank, newer] = older
    cache.idle_tokens[rank] -= cache.tokens
    return cache.tokens


@kernel
def lock(cache: PrefixCache, rank: int, request: int, blocks: int) -> int:
    """Lock the leading blocks that `find` found for a request; returns the tokens that stop being idle."""
    woken = 0
    for place in range(blocks):
        woken += _lock(cache, rank, cache.names[cache.offsets[request] + place])
    cache.shared[request] = blocks
    return woken


@kernel
def store(cache: PrefixCache, rank: int, request: int, prompt: int) -> tuple[int, int]:
    """Hand the full blocks of a prompt that was read to the cache.

    Returns the tokens that stop being the request's own, and those that stop being idle.
    """
    handed = woken = 0
    if cache.tokens == 0:
        return handed, woken
    first = cache.offsets[request]
    full = min(cache.offsets[request + 1] - first, prompt // cache.tokens)
    for place in range(cache.shared[request], full):
        block = cache.names[first + place]
        if cache.uses[rank, block] == ABSENT:
            cache.uses[rank, block] = 1
            woken += cache.tokens
        else:
            woken += _lock(cache, rank, block)
        handed += cache.tokens
    cache.shared[request] = max(full, cache.shared[request])
    return handed, woken


@kernel
def release(cache: PrefixCache, rank: int, request: int) -> int:
    """Stop using a request's blocks, the last first; returns the tokens that become idle."""
    idle = 0
    end = cache.uses.shape[1]
    for place in range(cache.shared[request] - 1, -1, -1):
        block = cache.names[cache.offsets[request] + place]
        cache.uses[rank, block] -= 1
        if cache.uses[rank, block] == 0:
            last = cache.older[rank, end]
            cache.newer[rank, last] = block
            cache.older[rank, block] = last
            cache.newer[rank, block] = end
            cache.older[rank, end] = block
            idle += cache.tokens
    cache.idle_tokens[rank] += idle
    cache.shared[request] = 0
    return idle


@kernel
def evict(cache: PrefixCache, rank: int, most_idle: int) -> None:
    """Drop unused blocks, least recently used first, until at most `most_idle` tokens are idle."""
    end = cache.uses.shape[1]
    while cache.idle_tokens[rank] > max(most_idle, 0):
        block = cache.newer[rank, end]
        following = cache.newer[rank, block]
        cache.newer[rank, end] = following
        cache.older[rank, following] = end
        cache.uses[rank, block] = ABSENT
        cache.idle_tokens[rank] -= cache.tokens
