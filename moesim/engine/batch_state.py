"""The state of continuous batching, as plain arrays over requests and ranks that compiled code works on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.engine.memory_rules import RESERVE, MemoryRule
from moesim.engine.prefix_cache import PrefixCache, new_prefix_cache

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

NONE = -1


class Requests(NamedTuple):
    """All requests of a run, by request id: lengths in tokens, times in seconds (NaN until known).

    target: tokens to compute before the next one is generated: the prompt, and after a preemption what was generated.
    read: of them computed or found in the prefix cache. held: tokens of KV memory of its own. following: the next
    request in the same rank's queue.
    """

    isl: Ints
    osl: Ints
    arrival_s: Floats
    target: Ints
    read: Ints
    generated: Ints
    held: Ints
    preempted: Ints
    first_token_s: Floats
    last_token_s: Floats
    finish_s: Floats
    following: Ints


class Ranks(NamedTuple):
    """The attention-DP ranks of one instance.

    head, tail [ranks]: the queue. reading: the request whose prompt is partly read. running [ranks, max_running].
    context: tokens of all running requests together, NONE where they have to be counted. kv_tokens: in use, the cache's
    idle blocks left out. elsewhere: requests of the rank in other batches that are under way. requests_in, tokens_in:
    requests at the rank, waiting or not, and their tokens so far. output_share: see MemoryRule. full: nobody is
    admitted until somebody leaves (SGLang's `batch_is_full`). unpolled: decode steps since it looked at new requests.
    held [2]: of the whole group, steps in which a rank had no prompt that it could read, and steps that prompts of all
    ranks waited for more. preemptions; recomputed_tokens: thrown away by them.
    """

    head: Ints
    tail: Ints
    reading: Ints
    running: Ints
    running_seqs: Ints
    context: Ints
    kv_tokens: Ints
    elsewhere: Ints
    requests_in: Ints
    tokens_in: Ints
    output_share: Floats
    full: NDArray[np.bool_]
    unpolled: Ints
    held: Ints
    preemptions: Ints
    recomputed_tokens: Ints
    cache: PrefixCache


class Limits(NamedTuple):
    """Batch limits of one attention-DP rank, and the engine's rules on mixing and on memory.

    draft_tokens, acceptance: of speculative decoding, 0 = none; draft_seed fixes which drafts are accepted. poll_steps:
    decode steps after which a rank looks at new requests; after a step that read prompts, or idle, it does at once.
    hold_steps, gather_steps: TensorRT-LLM's attention_dp_config, see `_held_back`; 0 = prompts are not held back.
    wait_steps, wait_tokens: its batch_wait options, see `_waits`; 0 = prompts do not wait for a fuller batch.
    of_batch: most requests of one of several batches under way, beside max_running of all of them; a prompt whose first
    part was read in another batch may come on top.
    """

    max_tokens: int
    max_running: int
    kv_tokens: int
    chunked: bool
    mixes: bool
    rule: MemoryRule = RESERVE
    draft_tokens: int = 0
    acceptance: float = 0.0
    draft_seed: int = 0
    poll_steps: int = 1
    hold_steps: int = 0
    gather_steps: int = 0
    wait_steps: int = 0
    wait_tokens: float = 0.0
    of_batch: int = 2**60


class Plan(NamedTuple):
    """The step that was formed: arrays over ranks; `picked`, `chunk` [ranks, max_running] are the prompts read.

    decode_seqs: decoding sequences, each with `draft_tokens` + 1 tokens; decode_kv: their summed context.
    prefill_prefix: summed context before the chunks. totals: decoding sequences and prompt tokens of all ranks, and the
    KV tokens of the fullest.
    """

    decode_seqs: Ints
    decode_kv: Floats
    prefill_seqs: Ints
    prefill_tokens: Ints
    prefill_prefix: Floats
    picked: Ints
    chunk: Ints
    totals: Ints


def new_requests(isl: Ints, osl: Ints) -> Requests:
    """Requests that have not arrived yet."""
    n = len(isl)
    nan = np.full(n, np.nan)
    zero = np.zeros(n, np.int64)
    return Requests(
        isl=isl.astype(np.int64),
        osl=osl.astype(np.int64),
        arrival_s=nan.copy(),
        target=isl.astype(np.int64),
        read=zero.copy(),
        generated=zero.copy(),
        held=zero.copy(),
        preempted=zero.copy(),
        first_token_s=nan.copy(),
        last_token_s=nan.copy(),
        finish_s=nan.copy(),
        following=np.full(n, NONE, np.int64),
    )


def new_ranks(ranks: int, max_running: int, *, rule: MemoryRule = RESERVE, cache: PrefixCache | None = None) -> Ranks:
    """Empty ranks; without a cache, no prefix is found."""
    empty = np.full(ranks, NONE, np.int64)
    zero = np.zeros(ranks, np.int64)
    return Ranks(
        head=empty.copy(),
        tail=empty.copy(),
        reading=empty.copy(),
        running=np.full((ranks, max_running), NONE, np.int64),
        running_seqs=zero.copy(),
        context=empty.copy(),
        kv_tokens=zero.copy(),
        elsewhere=zero.copy(),
        requests_in=zero.copy(),
        tokens_in=zero.copy(),
        output_share=np.full(ranks, rule.first_ratio),
        full=np.zeros(ranks, np.bool_),
        unpolled=zero.copy(),
        held=np.zeros(2, np.int64),
        preemptions=zero.copy(),
        recomputed_tokens=zero.copy(),
        cache=new_prefix_cache(0, ranks, 0, zero, zero) if cache is None else cache,
    )


def new_plan(ranks: int, max_running: int) -> Plan:
    """A reusable buffer for `plan_step`."""
    return Plan(
        decode_seqs=np.zeros(ranks, np.int64),
        decode_kv=np.zeros(ranks),
        prefill_seqs=np.zeros(ranks, np.int64),
        prefill_tokens=np.zeros(ranks, np.int64),
        prefill_prefix=np.zeros(ranks),
        picked=np.full((ranks, max_running), NONE, np.int64),
        chunk=np.zeros((ranks, max_running), np.int64),
        totals=np.zeros(3, np.int64),
    )
