"""Continuous batching of one lockstep group, compiled: which request gets which tokens in the next step.

The state is a set of plain arrays over requests and ranks; `plan` forms a step, `finish` carries it out. Requests of a
rank wait in arrival order. A request is admitted when its whole context (prompt and output) fits the rank's KV memory,
so that a running request is never preempted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

NONE = -1


class Requests(NamedTuple):
    """All requests of a run, by request id: lengths in tokens, times in seconds (NaN until known)."""

    isl: Ints
    osl: Ints
    arrival_s: Floats
    read: Ints
    generated: Ints
    first_token_s: Floats
    last_token_s: Floats
    finish_s: Floats
    following: Ints  # the next request in the same rank's queue


class Ranks(NamedTuple):
    """The attention-DP ranks of one instance."""

    head: Ints  # [ranks], first waiting request
    tail: Ints
    reading: Ints  # [ranks], the request whose prompt is partly read
    running: Ints  # [ranks, max_running]
    running_seqs: Ints  # [ranks]
    kv_tokens: Ints  # [ranks], reserved


class Limits(NamedTuple):
    """Batch limits of one attention-DP rank, and the engine's rule on mixing."""

    max_tokens: int
    max_running: int
    kv_tokens: int
    chunked: bool
    mixes: bool


class Plan(NamedTuple):
    """The step that was formed: arrays over ranks; `picked`, `chunk` [ranks, max_running] are the prompts read."""

    decode_seqs: Ints
    decode_kv: Floats  # summed context of the decoding sequences
    prefill_seqs: Ints
    prefill_tokens: Ints
    prefill_prefix: Floats  # summed context before the chunks
    picked: Ints
    chunk: Ints


def new_requests(isl: Ints, osl: Ints) -> Requests:
    """Requests that have not arrived yet."""
    n = len(isl)
    nan = np.full(n, np.nan)
    return Requests(
        isl=isl.astype(np.int64),
        osl=osl.astype(np.int64),
        arrival_s=nan.copy(),
        read=np.zeros(n, np.int64),
        generated=np.zeros(n, np.int64),
        first_token_s=nan.copy(),
        last_token_s=nan.copy(),
        finish_s=nan.copy(),
        following=np.full(n, NONE, np.int64),
    )


def new_ranks(ranks: int, max_running: int) -> Ranks:
    """Empty ranks."""
    empty = np.full(ranks, NONE, np.int64)
    return Ranks(
        head=empty.copy(),
        tail=empty.copy(),
        reading=empty.copy(),
        running=np.full((ranks, max_running), NONE, np.int64),
        running_seqs=np.zeros(ranks, np.int64),
        kv_tokens=np.zeros(ranks, np.int64),
    )


def new_plan(ranks: int, max_running: int) -> Plan:
    """A reusable buffer for `plan`."""
    return Plan(
        decode_seqs=np.zeros(ranks, np.int64),
        decode_kv=np.zeros(ranks),
        prefill_seqs=np.zeros(ranks, np.int64),
        prefill_tokens=np.zeros(ranks, np.int64),
        prefill_prefix=np.zeros(ranks),
        picked=np.full((ranks, max_running), NONE, np.int64),
        chunk=np.zeros((ranks, max_running), np.int64),
    )


@njit(cache=True)
def enqueue(requests: Requests, ranks: Ranks, rank: int, request: int) -> None:
    """Put a request at the end of a rank's queue."""
    if ranks.head[rank] == NONE:
        ranks.head[rank] = request
    else:
        requests.following[ranks.tail[rank]] = request
    ranks.tail[rank] = request


@njit(cache=True)
def _read_prompts(requests: Requests, ranks: Ranks, limits: Limits, plan: Plan, rank: int, budget: int) -> None:
    """Give prompt tokens to the request in progress, then to waiting ones, up to the budget."""
    seqs = 0
    while budget > 0:
        request = ranks.reading[rank]
        if request == NONE:
            request = ranks.head[rank]
            if request == NONE or ranks.running_seqs[rank] + seqs >= limits.max_running:
                break
            context = requests.isl[request] + requests.osl[request]
            if ranks.kv_tokens[rank] + context > limits.kv_tokens:
                break
            if not limits.chunked and requests.isl[request] > budget:
                break
            ranks.head[rank] = requests.following[request]
            ranks.kv_tokens[rank] += context
        left = requests.isl[request] - requests.read[request]
        tokens = min(left, budget) if limits.chunked else left
        plan.picked[rank, seqs] = request
        plan.chunk[rank, seqs] = tokens
        plan.prefill_tokens[rank] += tokens
        plan.prefill_prefix[rank] += requests.read[request]
        seqs += 1
        budget -= tokens
        ranks.reading[rank] = request if tokens < left else NONE
        if tokens < left:
            break
    plan.prefill_seqs[rank] = seqs


@njit(cache=True)
def plan_step(requests: Requests, ranks: Ranks, limits: Limits, plan: Plan) -> int:
    """Form the next step of all ranks into `plan`; returns the tokens in it (0: nothing to do)."""
    total = 0
    for rank in range(len(ranks.head)):
        plan.decode_seqs[rank] = 0
        plan.decode_kv[rank] = 0.0
        plan.prefill_seqs[rank] = 0
        plan.prefill_tokens[rank] = 0
        plan.prefill_prefix[rank] = 0.0
        budget = limits.max_tokens
        if limits.mixes:
            budget -= ranks.running_seqs[rank]
        _read_prompts(requests, ranks, limits, plan, rank, budget)
        if limits.mixes or plan.prefill_seqs[rank] == 0:
            plan.decode_seqs[rank] = ranks.running_seqs[rank]
            context = 0
            for place in range(ranks.running_seqs[rank]):
                request = ranks.running[rank, place]
                context += requests.isl[request] + requests.generated[request]
            plan.decode_kv[rank] = context
        total += plan.decode_seqs[rank] + plan.prefill_tokens[rank]
    return total


@njit(cache=True)
def finish_step(
    requests: Requests, ranks: Ranks, plan: Plan, now_s: float, gaps_s: Floats, gaps: int, ended: Ints
) -> tuple[int, int]:
    """Hand out the tokens of a planned step that ends at `now_s`.

    gaps_s: filled with inter-token latencies from index `gaps` on. ended: filled with the ids of finished requests.
    Returns the new number of gaps and the number of finished requests.
    """
    done = 0
    for rank in range(len(ranks.head)):
        place = 0
        left = plan.decode_seqs[rank]
        while left > 0:
            request = ranks.running[rank, place]
            gaps_s[gaps] = now_s - requests.last_token_s[request]
            gaps += 1
            requests.last_token_s[request] = now_s
            requests.generated[request] += 1
            left -= 1
            if requests.generated[request] >= requests.osl[request]:
                requests.finish_s[request] = now_s
                ended[done] = request
                done += 1
                ranks.kv_tokens[rank] -= requests.isl[request] + requests.osl[request]
                # Close the gap in order, so that the sequences still to be served in this step stay in place.
                for later in range(place, ranks.running_seqs[rank] - 1):
                    ranks.running[rank, later] = ranks.running[rank, later + 1]
                ranks.running_seqs[rank] -= 1
            else:
                place += 1
        for chosen in range(plan.prefill_seqs[rank]):
            request = plan.picked[rank, chosen]
            requests.read[request] += plan.chunk[rank, chosen]
            if requests.read[request] < requests.isl[request]:
                continue
            requests.first_token_s[request] = now_s
            requests.last_token_s[request] = now_s
            requests.generated[request] = 1
            if requests.osl[request] == 1:
                requests.finish_s[request] = now_s
                ended[done] = request
                done += 1
                ranks.kv_tokens[rank] -= requests.isl[request] + requests.osl[request]
            else:
                ranks.running[rank, ranks.running_seqs[rank]] = request
                ranks.running_seqs[rank] += 1
    return gaps, done
